"""A hint that passes the checks cannot confuse anything behind them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.hint_checks import fault_of
from promoe.hint import Hint, ObservedKind, PredictorVersion
from promoe.trace_events import HintFate

NUM_LAYERS, NUM_EXPERTS = 3, 5
ANNOUNCED = {
    "calibrated@1": PredictorVersion("calibrated@1", "a", ObservedKind.NONE, (1,), True, True),
    "ordered@1": PredictorVersion("ordered@1", "b", ObservedKind.NONE, (1,), False, True),
}

hints = st.builds(
    lambda step, layer, observed_step, observed_layer, pairs, num_expected, version: Hint(
        step,
        layer,
        observed_step,
        observed_layer,
        np.array([expert for expert, _ in pairs], np.uint16),
        np.array([score for _, score in pairs], np.float32),
        num_expected,
        version,
    ),
    st.integers(1, 3),
    st.integers(0, NUM_LAYERS),
    st.integers(1, 3),
    st.integers(0, NUM_LAYERS + 1),
    st.lists(
        st.tuples(
            st.integers(0, NUM_EXPERTS),
            st.one_of(st.floats(0, 1, width=32), st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf])),
        ),
        max_size=NUM_EXPERTS,
    ),
    st.integers(0, NUM_EXPERTS + 1),
    st.sampled_from([*ANNOUNCED, "nobody@1"]),
)


@given(hints)
def test_what_passes_is_a_ranking_of_this_models_experts(hint: Hint) -> None:
    experts, scores = hint.experts.tolist(), hint.scores.tolist()
    lookahead = (hint.step - hint.observed_step) * NUM_LAYERS + hint.layer - hint.observed_layer
    is_good = (
        hint.layer < NUM_LAYERS
        and hint.observed_layer <= NUM_LAYERS
        and 0 <= lookahead <= NUM_LAYERS
        and all(expert < NUM_EXPERTS for expert in experts)
        and len(set(experts)) == len(experts)
        and all(math.isfinite(score) for score in scores)
        and hint.num_expected <= NUM_EXPERTS
    )
    if hint.version == "calibrated@1":
        is_good = is_good and all(0 <= score <= 1.001 for score in scores)
    fault = fault_of(hint, NUM_LAYERS, NUM_EXPERTS, ANNOUNCED)
    if hint.version not in ANNOUNCED:
        assert fault is HintFate.WRONG_VERSION
    else:
        assert fault is (None if is_good else HintFate.INVALID)


def test_as_many_scores_as_experts() -> None:
    hint = Hint(1, 1, 1, 0, np.array([1, 2], np.uint16), np.array([0.5], np.float32), 1, "ordered@1")
    assert fault_of(hint, NUM_LAYERS, NUM_EXPERTS, ANNOUNCED) is HintFate.INVALID


@pytest.mark.parametrize("score", [1.0, 1.0 + 1e-6, 0.0])
def test_rounding_does_not_make_a_probability_wrong(score: float) -> None:
    hint = Hint(1, 1, 1, 0, np.array([1], np.uint16), np.array([score], np.float32), 1, "calibrated@1")
    assert fault_of(hint, NUM_LAYERS, NUM_EXPERTS, ANNOUNCED) is None
