"""The floor is the larger of compute and the optimum's bytes, by phase."""

from dataclasses import replace

import pytest

from compute_node.replay.belady import belady
from compute_node.replay.limits import limits_of
from compute_node.step_ledger import Phase
from tests.compute_node.replay.virtual_runs import made_up
from tests.promoe.traces import MadeUpRun

RUN = made_up(MadeUpRun(num_layers=4, decode_steps=20))


def test_with_a_slot_for_every_expert_nothing_is_loaded() -> None:
    for limits in limits_of(RUN, 8, 1.0).values():
        assert limits.least_nbytes == 0
        assert limits.floor_s == limits.all_resident_s > 0


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_the_optimum_is_counted_per_layer_and_over_all_layers(slots: int) -> None:
    cold = replace(RUN, header=replace(RUN.header, resident=(-1,) * (4 * slots)))
    cold = replace(cold, geometry=replace(cold.geometry, slots_per_layer=slots))
    limits = limits_of(cold, slots, 1.0)
    decode = [belady(cold.visits(layer), slots, ()).decode for layer in range(4)]
    assert limits[Phase.DECODE].belady_equal.hits == sum(count.hits for count in decode)
    assert limits[Phase.DECODE].belady_pooled == belady(cold.visits(), 4 * slots, ()).decode
    for phase in Phase:
        one = limits[phase]
        assert one.least_nbytes == min(one.belady_equal.misses, one.belady_pooled.misses) * RUN.geometry.blob_nbytes
        assert one.floor_s == max(one.all_resident_s, float(one.least_nbytes))


def test_phases_add_up_to_the_compute_of_the_run() -> None:
    limits = limits_of(RUN, 4, 1e9)
    assert sum(one.all_resident_s for one in limits.values()) == pytest.approx(sum(s.compute_s for s in RUN.steps))
