"""What no scheduling can beat: all experts resident, the offline optimum's bytes, and the floor that follows from both.

DESIGN: floor = max(compute with all experts resident, Belady bytes / link rate), by phase.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from compute_node.replay.belady import HitCount, PhaseHits, belady
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import starting_snapshot
from compute_node.schedule import SlotSplit
from compute_node.step_ledger import Phase


@dataclass(frozen=True)
class PhaseLimits:
    """One phase's.

    Attributes:
        all_resident_s: compute alone.
        belady_equal: the optimum where every layer has an equal share of the slots.
        belady_pooled: the optimum where all layers share them.
        least_nbytes: of the better one of both.
        floor_s: see the module.
    """

    all_resident_s: float
    belady_equal: HitCount
    belady_pooled: HitCount
    least_nbytes: int
    floor_s: float


def limits_of(run: RecordedRun, slots_per_layer: int, link_bytes_per_s: float) -> Mapping[Phase, PhaseLimits]:
    """By phase, from the same start as a replay with so many slots."""
    geometry = replace(run.geometry, slots_per_layer=slots_per_layer)
    equal = PhaseHits(HitCount(0, 0), HitCount(0, 0))
    resident = starting_snapshot(run, geometry, SlotSplit.LAYER).resident
    for layer in range(geometry.num_layers):
        held = (number for number in resident if number >= 0 and number // geometry.num_experts == layer)
        equal += belady(run.visits(layer), slots_per_layer, held)
    resident = starting_snapshot(run, geometry, SlotSplit.GLOBAL).resident
    pooled = belady(run.visits(), geometry.num_slots, (number for number in resident if number >= 0))
    limits: dict[Phase, PhaseLimits] = {}
    for phase, one, other in (
        (Phase.PREFILL, equal.prefill, pooled.prefill),
        (Phase.DECODE, equal.decode, pooled.decode),
    ):
        all_resident_s = sum(step.compute_s for step in run.steps if step.phase is phase)
        least_nbytes = min(one.misses, other.misses) * geometry.blob_nbytes
        floor_s = max(all_resident_s, least_nbytes / link_bytes_per_s)
        limits[phase] = PhaseLimits(all_resident_s, one, other, least_nbytes, floor_s)
    return limits
