"""Made-up routing: it has the figures that were asked for, and is the same for a seed."""

import numpy as np
import pytest

from compute_node.planning.made_up_routing import RoutingFigures, RoutingGeometry, fitted_law, structured_routing


@pytest.mark.parametrize("geometry", [RoutingGeometry(26, 64, 6), RoutingGeometry(30, 32, 8)], ids=str)
def test_the_routing_is_as_persistent_and_as_skewed_as_asked(geometry: RoutingGeometry) -> None:
    law = fitted_law(geometry, overlap=0.41, entropy=0.977)
    ids_TLK = structured_routing(geometry, law, 300, seed=7)
    assert all(
        len(set(ids_K)) == geometry.experts_per_token for ids_K in ids_TLK.reshape(-1, ids_TLK.shape[2]).tolist()
    )
    figures = RoutingFigures.of(ids_TLK, geometry.num_experts)
    assert figures.overlap == pytest.approx(0.41, abs=0.02)
    assert figures.entropy == pytest.approx(0.977, abs=0.01)
    assert np.array_equal(ids_TLK, structured_routing(geometry, law, 300, seed=7))
    assert not np.array_equal(ids_TLK, structured_routing(geometry, law, 300, seed=8))


def test_figures_of_routings_that_are_known() -> None:
    still = np.tile(np.array([[[0, 1]]]), (10, 1, 1))
    figures = RoutingFigures.of(still, 4)
    assert figures.overlap == 1.0
    assert figures.entropy == pytest.approx(0.5)
    changing = np.array([[[0, 1]], [[2, 3]]] * 5)
    figures = RoutingFigures.of(changing, 4)
    assert figures.overlap == 0.0
    assert figures.entropy == pytest.approx(1.0)
