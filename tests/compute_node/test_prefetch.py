"""Hints, budgets and shared slots: whatever comes in whatever order, every layer gets its own experts' bytes."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.device.cpu import CpuDevice
from compute_node.eviction import EVICTIONS
from compute_node.hint_inbox import ReceivedHint
from compute_node.schedule import POLICIES, HintUse, SchedulePolicy, SlotSplit
from promoe.hint import Hint, StepSpan, StepStart
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent
from tests.compute_node.expert_stack import ExpertStack, PlainArena, StackOptions, open_stack
from tests.compute_node.held_links import DEADLINE_S, GatedLink

NUM_LAYERS, NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 8, 2
LAYOUT = ExpertLayout.of(Dtype.FLOAT32, {"gate_up_proj": (32, 32), "down_proj": (32, 16)})


def numbered_arena() -> PlainArena:
    """Every expert's parameters are its own number."""
    arena = PlainArena(LAYOUT, NUM_LAYERS, NUM_EXPERTS)
    for layer, expert in itertools.product(range(NUM_LAYERS), range(NUM_EXPERTS)):
        number = float(layer * NUM_EXPERTS + expert + 1)
        arena.write(ExpertId(layer, expert), {part.name: torch.full(part.shape, number) for part in LAYOUT.tensors})
    return arena


class GatedDevice(CpuDevice):
    """Its copies return when the test says so."""

    def __init__(self, link: GatedLink) -> None:
        super().__init__()
        self._link = link

    def open_link(self) -> GatedLink:  # type: ignore[override]
        return self._link


@contextmanager
def stack(
    policy: SchedulePolicy, slots: int, link_bytes_per_s: float | None = None, device: CpuDevice | None = None
) -> Iterator[ExpertStack]:
    options = StackOptions(
        slots,
        device=device or CpuDevice(link_bytes_per_s),
        policy=policy,
        experts_per_token=EXPERTS_PER_TOKEN,
    )
    with open_stack(numbered_arena(), NUM_LAYERS, options) as opened:
        yield opened


def hint(step: int, layer: int, experts: list[int], scores: list[float] | None = None, head: int = 2) -> Hint:
    given_scores = scores if scores is not None else [0.9 - 0.1 * rank for rank in range(len(experts))]
    return Hint(
        step=step,
        layer=layer,
        observed_step=step,
        observed_layer=max(0, layer - 2),
        experts=np.array(experts, np.uint16),
        scores=np.array(given_scores, np.float32),
        num_expected=min(head, len(experts)),
        version="test@1",
    )


def begin(opened: ExpertStack, step: int, num_tokens: int = 1, is_prefill: bool = False) -> None:
    opened.expert_cache.begin_step(StepStart(step, (StepSpan("request", num_tokens, is_prefill),)))


def use(opened: ExpertStack, layer: int, ids_TK: list[list[int]]) -> tuple[int, ...]:
    """One layer's step; checks the bytes of every slot handed out. Returns the hits."""
    routing = np.array(ids_TK, np.uint16)
    needed = np.unique(routing).tolist()
    arrived: list[int] = []
    opened.expert_cache.notice()
    with opened.expert_cache.acquire(layer, needed, routing) as acquisition:
        for expert, slot_index in opened.expert_cache.arrivals(acquisition):
            held = bytes(opened.slots_SB[slot_index][: LAYOUT.blob_nbytes].numpy().tobytes())
            assert held == opened.arena.bytes_of(ExpertId(layer, expert)), "a slot holds the expert it is handed out as"
            arrived.append(expert)
        assert sorted(arrived) == needed, "every needed expert is handed out once"
        hits = acquisition.hits
        assert sorted((*acquisition.hits, *acquisition.misses)) == needed
        assert set(acquisition.late) <= set(acquisition.misses)
    opened.expert_cache.check_integrity()
    return hits


@dataclass(frozen=True)
class Visit:
    """One layer of one step, with the hints that are waiting before it; hints may be for anything."""

    ids_TK: list[list[int]]
    hints: list[tuple[int, int, list[int], list[float]]]


tokens = st.lists(
    st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=EXPERTS_PER_TOKEN, max_size=EXPERTS_PER_TOKEN, unique=True),
    min_size=1,
    max_size=4,
)
hint_lists = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS, unique=True).flatmap(
    lambda experts: st.tuples(
        st.integers(-1, 2),
        st.integers(0, NUM_LAYERS - 1),
        st.just(experts),
        st.lists(st.floats(0, 1), min_size=len(experts), max_size=len(experts)).map(lambda s: sorted(s, reverse=True)),
    )
)
runs = st.lists(
    st.lists(st.builds(Visit, tokens, st.lists(hint_lists, max_size=4)), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    min_size=1,
    max_size=5,
)
policies = st.builds(
    SchedulePolicy,
    name=st.just("random"),
    eviction=st.sampled_from(sorted(EVICTIONS)),
    slot_split=st.sampled_from(SlotSplit),
    hints=st.sampled_from(HintUse),
    chunks_per_expert=st.sampled_from([1, 3]),
    max_chunks_in_flight=st.integers(1, 3),
    early_preemption=st.booleans(),
    reorder=st.booleans(),
    stream_prefill=st.booleans(),
    chunks_demand=st.booleans(),
    chunk_nbytes=st.sampled_from([None, 100, 4096]),
    serial=st.booleans(),
)


@settings(max_examples=120, deadline=None)
@given(run=runs, policy=policies, slots=st.integers(1, NUM_EXPERTS), prefill_first=st.booleans())
def test_any_schedule_hands_out_the_right_experts(
    run: list[list[Visit]], policy: SchedulePolicy, slots: int, prefill_first: bool
) -> None:
    events: list[TraceEvent] = []
    with stack(policy, slots) as opened:
        opened.expert_cache.sinks.append(events.append)
        for number, visits in enumerate(run, start=1):
            begin(opened, number, num_tokens=len(visits[0].ids_TK), is_prefill=prefill_first and number == 1)
            for layer, visit in enumerate(visits):
                for offset, hinted, experts, scores in visit.hints:
                    opened.hints.put(ReceivedHint(hint(max(0, number + offset), hinted, experts, scores), None))
                use(opened, layer, visit.ids_TK)
        counters = opened.expert_cache.prefetch_counters
        moved = opened.transfers.stats().uploaded_nbytes
    layers = [event for event in events if isinstance(event, LayerEvent)]
    assert len(layers) == len(run) * NUM_LAYERS
    assert [event.step for event in layers] == sorted(event.step for event in layers)
    num_misses = sum(len(event.misses) for event in layers)
    assert sum(c.misses for c in opened.expert_cache.counters) == num_misses
    if policy.hints is HintUse.IGNORE and not policy.stream_prefill:
        assert moved == num_misses * LAYOUT.blob_nbytes, "a miss is one expert's bytes"
        assert counters.useful_nbytes == counters.late_nbytes == counters.wasted_nbytes == 0
    assert counters.useful_nbytes % LAYOUT.blob_nbytes == 0
    hinted_events = [event for event in events if isinstance(event, HintEvent)]
    assert len(hinted_events) == sum(len(visit.hints) for visits in run for visit in visits), "every hint is told of"


def test_what_is_hinted_is_there_when_it_is_needed() -> None:
    policy = replace(POLICIES["proactive"], slot_split=SlotSplit.LAYER)
    with stack(policy, 4) as opened:
        arrived: list[LoadEvent] = []
        opened.expert_cache.sinks.append(lambda event: arrived.append(event) if isinstance(event, LoadEvent) else None)
        begin(opened, 1)
        opened.hints.put(ReceivedHint(hint(1, 1, [6, 7]), 0.001))
        use(opened, 0, [[0, 1]])
        wait_until_loaded(opened, 1, [6, 7])
        assert use(opened, 1, [[6, 7]]) == (6, 7)
        assert {event.expert for event in arrived if event.reason is LoadReason.PREFETCH} == {(1, 6), (1, 7)}
        counters = opened.expert_cache.prefetch_counters
        assert (counters.useful_nbytes, counters.late_nbytes, counters.wasted_nbytes) == (2 * LAYOUT.blob_nbytes, 0, 0)


def test_hints_change_nothing_where_they_are_ignored() -> None:
    with stack(POLICIES["lru"], 4) as opened:
        begin(opened, 1)
        opened.hints.put(ReceivedHint(hint(1, 1, [6, 7]), 0.001))
        use(opened, 0, [[0, 1]])
        assert use(opened, 1, [[6, 7]]) == ()


@pytest.mark.parametrize(
    ("step", "layer", "fate"),
    [
        (1, 0, HintFate.LATE),
        (1, 1, HintFate.LATE),
        (1, 2, HintFate.TAKEN),
        (2, 0, HintFate.TAKEN),
        (2, 2, HintFate.INVALID),
        (3, 0, HintFate.INVALID),
        (0, 3, HintFate.LATE),
    ],
)
def test_a_hint_is_for_a_visit_that_comes(step: int, layer: int, fate: HintFate) -> None:
    fates: list[HintFate] = []
    with stack(POLICIES["proactive"], 4) as opened:
        begin(opened, 1)
        use(opened, 0, [[0, 1]])
        use(opened, 1, [[0, 1]])
        opened.expert_cache.sinks.append(lambda e: fates.append(e.fate) if isinstance(e, HintEvent) else None)
        opened.hints.put(ReceivedHint(hint(step, layer, [5]), None))
        opened.expert_cache.notice()
    assert fates == [fate]


def test_eviction_hears_of_what_an_active_version_and_its_canary_say_together() -> None:
    with stack(POLICIES["proactive"], 3) as opened:
        begin(opened, 1)
        for version, expert in (("active@1", 6), ("canary@1", 7)):
            made = replace(hint(1, 2, [expert], [0.9]), version=version)
            opened.hints.put(ReceivedHint(made, None))
        opened.expert_cache.notice()
        expected = opened.expert_cache._history.next_probabilities_of(2)
        assert expected[6] == expected[7] == pytest.approx(0.9)


def test_a_hint_for_the_next_step_outlives_this_one() -> None:
    with stack(POLICIES["proactive"], 4) as opened:
        begin(opened, 1)
        for layer in range(NUM_LAYERS):
            use(opened, layer, [[0, 1]])
        opened.hints.put(ReceivedHint(hint(2, 0, [6, 7]), None))
        opened.expert_cache.notice()
        begin(opened, 2)
        wait_until_loaded(opened, 0, [6, 7])
        assert use(opened, 0, [[6, 7]]) == (6, 7)


def test_the_experts_that_are_not_needed_give_way_half_loaded_and_go_on_later() -> None:
    """On a link that takes 50 ms per expert: what is dropped half way keeps its bytes and pays when it is needed."""
    policy = replace(POLICIES["promoe"], chunk_nbytes=512)
    with stack(policy, 4, link_bytes_per_s=LAYOUT.blob_nbytes / 0.05) as opened:
        paused: list[LoadEvent] = []
        opened.expert_cache.sinks.append(
            lambda e: paused.append(e) if isinstance(e, LoadEvent) and e.is_paused else None
        )
        begin(opened, 1)
        opened.hints.put(ReceivedHint(hint(1, 1, [6]), None))
        use(opened, 0, [[0, 1]])
        wait_until_begun(opened, 1, 6)
        use(opened, 1, [[2, 3]])
        assert [event.expert for event in paused] == [ExpertId(1, 6)]
        assert 0 < paused[0].nbytes < LAYOUT.blob_nbytes
        for layer in (2, 3):
            use(opened, layer, [[0, 1]])
        before = opened.transfers.stats().uploaded_nbytes
        begin(opened, 2)
        use(opened, 0, [[0, 1]])
        use(opened, 1, [[6, 3]])
        assert opened.transfers.stats().uploaded_nbytes - before <= LAYOUT.blob_nbytes - paused[0].nbytes
        assert opened.expert_cache.prefetch_counters.late_nbytes == LAYOUT.blob_nbytes


def test_a_blob_is_retired_when_the_chunk_of_a_load_that_was_given_up_has_ended() -> None:
    """After it the arena may be unmapped under the copy, which would end the process."""
    link = GatedLink()
    with stack(POLICIES["promoe"], 4, device=GatedDevice(link)) as opened:
        try:
            begin(opened, 1)
            opened.hints.put(ReceivedHint(hint(1, 1, [6], head=1), None))
            opened.expert_cache.notice()
            link.wait_for_copies(1)
            opened.expert_cache.snapshot()  # gives up what is loaded for nobody
            assert opened.expert_cache._table.find(ExpertId(1, 6)) is None
            retirer = threading.Thread(target=opened.expert_cache.blob_retired, args=(ExpertId(1, 6),))
            retirer.start()
            retirer.join(0.05)
            assert retirer.is_alive(), "the link reads the blob"
            link.gate.release()
            retirer.join(DEADLINE_S)
            assert not retirer.is_alive()
        finally:
            link.gate.release(1000)


def test_a_prefill_streams_its_next_layers() -> None:
    everything = [[number, (number + 1) % NUM_EXPERTS] for number in range(NUM_EXPERTS)]
    with stack(POLICIES["proactive"], NUM_EXPERTS) as opened:
        begin(opened, 1, num_tokens=64, is_prefill=True)
        wait_until_loaded(opened, 0, list(range(NUM_EXPERTS)))
        assert use(opened, 0, everything) == tuple(range(NUM_EXPERTS))
        assert opened.expert_cache.prefetch_counters.streamed_nbytes >= NUM_EXPERTS * LAYOUT.blob_nbytes
        assert opened.expert_cache.prefetch_counters.useful_nbytes == 0, "streaming is not prediction"


def test_shared_slots_go_to_the_layer_that_needs_them() -> None:
    """Eight slots for four layers: one that needs six gets them, and they stay until somebody needs them more."""
    policy = replace(POLICIES["proactive"], stream_prefill=False)
    with stack(policy, 2) as opened:
        begin(opened, 1)
        use(opened, 0, [[0, 1], [2, 3], [4, 5]])
        assert opened.expert_cache.occupancy(0).resident == 6
        for layer in range(1, NUM_LAYERS):
            use(opened, layer, [[0, 1]])
        assert sum(opened.expert_cache.occupancy(layer).resident for layer in range(NUM_LAYERS)) == 8


def test_steps_begin_with_an_event_and_looks_are_counted() -> None:
    events: list[TraceEvent] = []
    with stack(POLICIES["proactive"], 2) as opened:
        opened.expert_cache.sinks.append(events.append)
        begin(opened, 7)
        opened.hints.put(ReceivedHint(hint(7, 2, [3]), None))
        use(opened, 0, [[0, 1]])
    assert isinstance(events[0], StepEvent)
    hinted = next(event for event in events if isinstance(event, HintEvent))
    assert hinted.look == 1, "0 is the beginning of the step, 1 the look before the layer"


def test_a_snapshot_makes_a_new_cache_decide_the_same() -> None:
    policy = POLICIES["proactive"]
    with stack(policy, 3) as first:
        begin(first, 1)
        for layer in range(NUM_LAYERS):
            use(first, layer, [[layer, layer + 1]])
        snapshot = first.expert_cache.snapshot()
        with stack(policy, 3) as second:
            second.expert_cache.restore(snapshot)
            second.expert_cache.check_integrity()
            assert second.expert_cache.snapshot() == snapshot
            assert second.expert_cache.resident_states().tolist() == first.expert_cache.resident_states().tolist()


def wait_until_begun(opened: ExpertStack, layer: int, expert: int) -> None:
    """Until a part of it, but not all, was copied."""
    slot = opened.expert_cache._table.find(ExpertId(layer, expert))
    assert slot is not None
    assert slot.load is not None
    while slot.load.copied_nbytes == 0:
        threading.Event().wait(0.0005)


def wait_until_loaded(opened: ExpertStack, layer: int, experts: list[int]) -> None:
    """Looks around until they are READY."""
    for _ in range(10_000):
        opened.expert_cache.notice()
        if all(opened.expert_cache.resident_states()[layer, expert] & 1 for expert in experts):
            return
        threading.Event().wait(0.0005)
    raise AssertionError("the link moved nothing")
