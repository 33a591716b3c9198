"""A run that is repeated with its own policy finds its own hits, and one that is not its own is caught."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.recorded_order import verify
from compute_node.replay.recorded_policy import recorded_policy
from compute_node.replay.recorded_run import RecordedRun
from compute_node.schedule import POLICIES, SchedulePolicy
from promoe.ids import ExpertId
from promoe.trace_events import LayerEvent, LoadEvent
from tests.compute_node.replay.virtual_runs import TracedSimulation, by_step, made_up, what_if
from tests.promoe.traces import MadeUpRun

HINTS = st.builds(
    HintSettings,
    st.sampled_from(HintSource),
    st.integers(1, 4),
    st.none() | st.floats(0, 0.01),
)


@st.composite
def schedules(draw: st.DrawFn) -> SchedulePolicy:
    """A named policy, some of its settings replaced."""
    policy = draw(st.sampled_from([POLICIES[name] for name in sorted(POLICIES)]))
    return replace(
        policy,
        chunk_nbytes=draw(st.none() | st.integers(500, 5000)),
        max_chunks_in_flight=draw(st.integers(1, 3)),
        early_preemption=draw(st.sampled_from([policy.early_preemption, True, False])),
        reorder=draw(st.sampled_from([policy.reorder, True, False])),
        serial=draw(st.sampled_from([False, False, True])),
    )


@settings(max_examples=40, deadline=None)
@given(
    policy=schedules(),
    slots=st.integers(1, 8),
    hints=HINTS,
    seed=st.integers(0, 1000),
    first_step=st.integers(1, 12),
)
def test_every_policy_repeats_its_run_exactly(
    policy: SchedulePolicy, slots: int, hints: HintSettings, seed: int, first_step: int
) -> None:
    run = made_up(MadeUpRun(num_layers=4, seed=seed, decode_steps=8))
    traced = TracedSimulation(run, what_if(policy, slots, hints), first_step)
    traced.simulation.expert_cache.check_integrity()
    recorded = traced.recorded()
    own = recorded_policy(recorded.header)
    assert replace(own, chunk_nbytes=None) == replace(policy, chunk_nbytes=None)
    verification = verify(recorded, own)
    assert verification.parted is None
    assert verification.num_accesses == recorded.num_accesses


@pytest.fixture
def prefetched() -> TracedSimulation:
    run = made_up(MadeUpRun(num_layers=4, decode_steps=12))
    return TracedSimulation(run, what_if("promoe", 3))


def test_another_policy_parts_from_the_run(prefetched: TracedSimulation) -> None:
    verification = verify(prefetched.recorded(), POLICIES["lru"])
    assert verification.parted is not None
    assert verification.parted.startswith("step ")


def test_a_changed_trace_is_caught_where_it_was_changed(prefetched: TracedSimulation) -> None:
    events = list(prefetched.events)
    place = next(i for i, event in enumerate(events) if isinstance(event, LayerEvent) and event.step == 5)
    event = events[place]
    assert isinstance(event, LayerEvent)
    swapped = replace(event, hits=event.misses, misses=event.hits)
    events[place] = swapped
    changed = RecordedRun.of(prefetched.header(), by_step(events))
    verification = verify(changed, POLICIES["promoe"])
    assert verification.parted is not None
    assert verification.parted.startswith(f"step 5, layer {event.layer}: the run found ")


def test_a_load_that_the_replay_does_not_ask_for_is_caught(prefetched: TracedSimulation) -> None:
    events = list(prefetched.events)
    place = next(i for i, event in enumerate(events) if isinstance(event, LoadEvent))
    known = events[place]
    assert isinstance(known, LoadEvent)
    events.insert(place, replace(known, expert=ExpertId(3, 7)))
    verification = verify(RecordedRun.of(prefetched.header(), by_step(events)), POLICIES["promoe"])
    assert verification.parted is not None


def test_a_load_that_never_arrived_is_caught(prefetched: TracedSimulation) -> None:
    events = list(prefetched.events)
    del events[next(i for i, event in enumerate(events) if isinstance(event, LoadEvent))]
    verification = verify(RecordedRun.of(prefetched.header(), by_step(events)), POLICIES["promoe"])
    assert verification.parted is not None
