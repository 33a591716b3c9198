"""The cache map against a plain restatement: what a layer was asked last, over what the slots hold."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.cache_map import CacheMapRecorder, StateArray
from promoe.cache_map import CacheMap, ExpertBit
from promoe.hint import StepSpan
from promoe.ids import ExpertId
from promoe.trace_events import LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent

LAYERS, EXPERTS = 3, 8
NOTHING: StateArray = np.zeros((LAYERS, EXPERTS), np.uint8)


def routed(layer: int, hits: tuple[int, ...], misses: tuple[int, ...], step: int = 1) -> LayerEvent:
    return LayerEvent(0.0, 0.1, step, layer, np.array([[*hits, *misses]], np.uint16), hits, misses, (), 0.0)


def began(step: int) -> StepEvent:
    return StepEvent(0.0, step, (StepSpan("r", 1, False),))


@st.composite
def layer_events(draw: st.DrawFn) -> LayerEvent:
    experts = draw(st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=EXPERTS))
    num_hits = draw(st.integers(0, len(experts)))
    return routed(draw(st.integers(0, LAYERS - 1)), tuple(experts[:num_hits]), tuple(experts[num_hits:]))


@given(
    st.lists(st.one_of(layer_events(), st.builds(began, st.integers(1, 9)))),
    st.lists(st.integers(0, 7), min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS),
)
def test_the_last_routing_of_each_layer_lies_over_the_slots(events: list[TraceEvent], slots: list[int]) -> None:
    slots_LE = np.array(slots, np.uint8).reshape(LAYERS, EXPERTS)
    recorder = CacheMapRecorder(LAYERS, EXPERTS, lambda: slots_LE)
    for event in events:
        recorder(event)
    snapshot = recorder.snapshot()
    last = {event.layer: event for event in events if isinstance(event, LayerEvent)}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            expected = int(slots_LE[layer, expert])
            if layer in last and expert in (*last[layer].hits, *last[layer].misses):
                expected |= ExpertBit.ROUTED
            if layer in last and expert in last[layer].misses:
                expected |= ExpertBit.MISSED
            assert snapshot.by_layer[layer][expert] == expected
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    layers = [event.layer for event in events if isinstance(event, LayerEvent)]
    assert (snapshot.step, snapshot.layer) == ((steps or [0])[-1], (layers or [0])[-1])


def test_a_snapshot_is_the_moment_it_was_taken() -> None:
    slots_LE = NOTHING.copy()
    recorder = CacheMapRecorder(LAYERS, EXPERTS, lambda: slots_LE)
    recorder(routed(1, (2,), (3,)))
    before = recorder.snapshot()
    slots_LE[1, 2] = ExpertBit.RESIDENT
    recorder(routed(1, (2, 3), ()))
    recorder(LoadEvent(0.0, 0.0, 0.0, ExpertId(1, 3), LoadReason.DEMAND, 9))  # told by the slots, not by the load
    after = recorder.snapshot()
    assert list(before.by_layer[1][2:4]) == [ExpertBit.ROUTED, ExpertBit.ROUTED | ExpertBit.MISSED]
    assert list(after.by_layer[1][2:4]) == [ExpertBit.RESIDENT | ExpertBit.ROUTED, ExpertBit.ROUTED]
    assert slots_LE[1, 2] == ExpertBit.RESIDENT  # the cache's own table is not written to


def test_another_thread_never_sees_half_a_layer() -> None:
    recorder = CacheMapRecorder(LAYERS, EXPERTS, lambda: NOTHING)
    events = [routed(0, (0, 1), (2, 3)), routed(0, (4, 5), (6, 7))]
    stop = threading.Event()

    def tell() -> None:
        while not stop.is_set():
            for event in events:
                recorder(event)

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        seen = {recorder.snapshot().experts for _ in range(300)} - {NOTHING.tobytes()}
    finally:
        stop.set()
        thread.join()
    whole = set()
    for event in events:
        recorder(event)
        whole.add(recorder.snapshot().experts)
    assert seen <= whole


def test_a_map_of_another_size_than_it_says_is_refused() -> None:
    with pytest.raises(ValueError, match="has 7 bytes; expected 2 layers × 4 experts"):
        _ = CacheMap(2, 4, bytes(7), 0, 0).by_layer
