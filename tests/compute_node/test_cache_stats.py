"""What is counted of each layer: the recorder's own figures and Prometheus's must say the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from compute_node.acquisition import Acquisition
from compute_node.cache_stats import CacheMetrics, StepRecorder
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from promoe.ids import ExpertId
from promoe.trace_events import LoadEvent, LoadReason

NUM_EXPERTS = 6


class Counting:
    """A recorder, its ledger and what Prometheus would be told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ledger = StepLedger()
        self.compute_stall_s = 0.0
        self.recorder = StepRecorder(self.ledger, CacheMetrics.register(self.registry), self.stall_s)

    def stall_s(self, host_wait_s: float) -> float:
        """A device on which compute waits beside the host."""
        return host_wait_s + self.compute_stall_s

    def metric(self, name: str, phase: Phase, **labels: str) -> float:
        return self.registry.get_sample_value(f"promoe_{name}_total", {"phase": phase.value, **labels}) or 0.0

    def check(self) -> None:
        for phase, counters in self.recorder.phases.items():
            assert self.metric("expert_hits", phase) == counters.hits
            late = self.metric("expert_misses", phase, cause="late_prefetch")
            assert late == counters.late_prefetches
            assert self.metric("expert_misses", phase, cause="absent") + late == counters.misses
            assert self.metric("expert_loaded_bytes", phase, reason="demand") == counters.demand_nbytes
            late_stall_s = self.metric("stall_seconds", phase, cause="late_prefetch")
            assert late_stall_s == pytest.approx(counters.late_prefetch_stall_s)
            stall_s = self.metric("stall_seconds", phase, cause="demand_load") + late_stall_s
            assert stall_s == pytest.approx(counters.stall_s)


layers = st.lists(
    st.tuples(
        st.lists(st.sampled_from(Phase), min_size=1, max_size=4),
        st.sets(st.integers(0, NUM_EXPERTS - 1)),
        st.floats(0, 2),
        st.floats(0, 2),
        st.floats(0, 1),
        st.integers(0, NUM_EXPERTS),
    ),
    max_size=8,
)


@given(layers=layers)
def test_prometheus_and_the_recorder_agree(
    layers: list[tuple[list[Phase], set[int], float, float, float, int]],
) -> None:
    counting = Counting()
    counting.recorder.begin()
    asked = 0
    stall_s = 0.0
    num_late = 0
    for phases, resident, host_stall_s, compute_stall_s, late_share, most_late in layers:
        spans = [TokenSpan(f"r{row}", 1, phase) for row, phase in enumerate(phases)]
        ids_TK = np.array([[row % NUM_EXPERTS, (row + 3) % NUM_EXPERTS] for row in range(len(phases))])
        needed = set(ids_TK.reshape(-1).tolist())
        misses = tuple(sorted(needed - resident))
        late = misses[:most_late]
        acquisition = Acquisition(
            layer=0,
            hits=tuple(sorted(needed & resident)),
            misses=misses,
            stall_s=host_stall_s,
            loaded_nbytes=100 * (len(misses) - len(late)),
            late=late,
            late_stall_s=host_stall_s * late_share if late else 0.0,
        )
        counting.compute_stall_s = compute_stall_s
        counting.ledger.begin_step(spans)
        counting.recorder.record_layer(acquisition, ids_TK)
        counting.ledger.end_step()
        asked += sum(
            len({expert for row, phase in enumerate(phases) if phase is each for expert in ids_TK[row].tolist()})
            for each in Phase
        )
        num_late += sum(
            len({e for row, phase in enumerate(phases) if phase is each for e in ids_TK[row].tolist() if e in late})
            for each in Phase
        )
        stall_s += host_stall_s + compute_stall_s
    counting.check()
    counted = counting.recorder.phases.values()
    assert sum(each.hits + each.misses for each in counted) == asked
    assert sum(each.late_prefetches for each in counted) == num_late
    assert sum(each.stall_s for each in counted) == pytest.approx(stall_s)


def test_a_wait_that_ends_in_a_layer_of_hits_is_counted() -> None:
    counting = Counting()
    counting.recorder.begin()
    counting.compute_stall_s = 0.25
    counting.ledger.begin_step([TokenSpan("r", 1, Phase.DECODE)])
    counting.recorder.record_layer(Acquisition(1, (0, 1), ()), np.array([[0, 1]]))
    assert counting.metric("stall_seconds", Phase.DECODE, cause="demand_load") == 0.25
    assert counting.ledger.take("r").decode.stall_s == 0.25


def test_nothing_is_counted_before_the_start_or_outside_a_step() -> None:
    counting = Counting()
    counting.ledger.begin_step([TokenSpan("r", 1, Phase.DECODE)])
    counting.recorder.record_layer(Acquisition(0, (0,), (1,)), np.array([[0, 1]]))
    counting.ledger.end_step()
    counting.recorder.begin()
    counting.recorder.record_layer(Acquisition(0, (0,), (1,)), np.array([[0, 1]]))
    counting.check()
    assert all(counters.hits + counters.misses + counters.steps == 0 for counters in counting.recorder.phases.values())


def load(expert: int, reason: LoadReason, *, is_paused: bool = False) -> LoadEvent:
    return LoadEvent(0, 0, 0, ExpertId(0, expert), reason, 100, is_paused=is_paused)


def test_bytes_are_counted_by_reason_for_the_phase_they_arrive_in() -> None:
    counting = Counting()
    counting.recorder(load(0, LoadReason.PREFETCH))
    counting.recorder.begin()
    counting.recorder(load(0, LoadReason.PREFETCH))
    counting.ledger.begin_step([TokenSpan("r", 1, Phase.DECODE), TokenSpan("s", 3, Phase.PREFILL)])
    counting.recorder(load(0, LoadReason.STREAM))
    counting.recorder(load(1, LoadReason.PREFETCH, is_paused=True))
    counting.ledger.begin_step([TokenSpan("r", 1, Phase.DECODE)])
    counting.recorder(load(1, LoadReason.PREFETCH))
    # What became urgent on its way was asked for as a prefetch; the other one is an absent expert's demand load.
    counting.recorder(load(2, LoadReason.DEMAND))
    counting.recorder(load(3, LoadReason.DEMAND))
    counting.recorder.record_layer(Acquisition(0, (1,), (2, 3), 0.5, 100, late=(2,)), np.array([[1, 2, 3]]))
    counting.recorder.record_layer(Acquisition(1, (), (2,), 0.5, 0, late=(2,)), np.array([[2]]))
    bytes_by_reason = {
        (phase, reason): counting.metric("expert_loaded_bytes", phase, reason=reason.value)
        for phase in Phase
        for reason in LoadReason
    }
    assert {key: amount for key, amount in bytes_by_reason.items() if amount} == {
        (Phase.PREFILL, LoadReason.STREAM): 100,
        (Phase.DECODE, LoadReason.PREFETCH): 200,
        (Phase.DECODE, LoadReason.DEMAND): 100,
    }
