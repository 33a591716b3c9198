"""Whole steps or none, in their order, with their hidden states; nothing while nobody records."""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch

from compute_node.device.cpu import DONE
from compute_node.device.seam import HostCopy
from compute_node.expert_cache import CacheSnapshot
from compute_node.layer_sample import LayerSample, WantedSamples
from compute_node.trace_recorder import BATCH_NBYTES, MAX_ROWS, QUEUE_NBYTES, Recording, TraceRecorder, TraceWish
from promoe.errors import Overloaded, Unavailable
from promoe.hint import ObservedKind, StepSpan, StepStart
from promoe.trace_events import HintEvent, LayerEvent, StepEvent, TraceBatch, TraceEvent
from tests.promoe.traces import MadeUpRun, same_event

RUN = MadeUpRun()
EVENTS_ONLY = TraceWish(0, layer_input=False, router_input=False)
EVERYTHING = TraceWish(4, layer_input=True, router_input=True)
STEP_NBYTES = 1 << 20

_T = TypeVar("_T")


def recorder() -> TraceRecorder:
    return TraceRecorder(RUN.num_layers, lambda: CacheSnapshot([3, -1], '{"uses": 1}'))


def running(scenario: Callable[[], Awaitable[_T]]) -> _T:
    async def whole() -> _T:
        return await asyncio.wait_for(scenario(), 20)

    return asyncio.run(whole())


async def read(recording: Recording, num_events: int) -> tuple[list[TraceEvent], int]:
    """So many events, and how many steps were left out by then."""
    events: list[TraceEvent] = []
    async for batch in recording.batches(as_it_is):
        events.extend(batch.events)
        if len(events) >= num_events:
            return events, batch.dropped_steps
    raise AssertionError(f"it ended after {len(events)} events")


def as_it_is(batch: TraceBatch) -> TraceBatch:
    return batch


def steps_of(events: list[TraceEvent]) -> list[list[TraceEvent]]:
    steps: list[list[TraceEvent]] = []
    for event in events:
        if isinstance(event, StepEvent):
            steps.append([])
        steps[-1].append(event)
    return steps


def sample(step: int, layer: int, kind: ObservedKind, rows: tuple[int, ...] = (0,)) -> LayerSample:
    """Its values say where it is from."""
    value = layer + (100 if kind is ObservedKind.ROUTER_INPUT else 0)
    hidden_RD = torch.full((len(rows), 4), value, dtype=torch.bfloat16)
    return LayerSample(step, layer, kind, rows, 1, HostCopy(hidden_RD, DONE), ())


def play_step(recorder: TraceRecorder, events: list[TraceEvent], rows: tuple[int, ...] = (0,)) -> WantedSamples | None:
    """One step as the cache and the observer tell it, its hidden states included."""
    (first, *others) = events
    assert isinstance(first, StepEvent)
    wanted = recorder.begin_step(StepStart(first.step, first.spans))
    recorder.record(first)
    for event in others:
        if isinstance(event, LayerEvent) and wanted is not None:
            for kind in (ObservedKind.LAYER_INPUT, ObservedKind.ROUTER_INPUT):
                recorder.take(sample(first.step, event.layer, kind, rows))
        recorder.record(event)
    if wanted is not None:
        recorder.take(sample(first.step, RUN.num_layers, ObservedKind.LAYER_INPUT, rows))
    return wanted


def test_steps_are_recorded_from_the_next_one_on() -> None:
    events = list(RUN.events())
    steps = steps_of(events)

    async def scenario() -> None:
        traces = recorder()
        for event in steps[0][:3]:
            traces.record(event)  # nobody records
        recording = traces.open(EVENTS_ONLY)
        for event in itertools.chain(steps[0][3:], *steps[1:4]):
            traces.record(event)
        beginning = await recording.beginning()
        assert beginning.snapshot == CacheSnapshot([3, -1], '{"uses": 1}')
        recorded, dropped = await read(recording, sum(map(len, steps[1:4])))
        assert dropped == 0
        assert beginning.began_s == steps[1][0].at_s
        assert all(map(same_event, recorded, itertools.chain(*steps[1:4])))

    running(scenario)


def test_hidden_states_come_with_their_layers() -> None:
    steps = steps_of(list(RUN.events()))

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVERYTHING)
        wanted = [play_step(traces, step, rows=(0, 2)) for step in steps[:2]]
        assert wanted == [WantedSamples(4, True, True, routing=False)] * 2
        recorded, _ = await read(recording, len(steps[0]) + len(steps[1]))
        layers = [event for event in recorded if isinstance(event, LayerEvent)]
        assert len(layers) == 2 * RUN.num_layers
        for event in layers:
            assert event.rows == (0, 2)
            for hidden_RD, value in ((event.layer_input_RD, event.layer), (event.router_input_RD, event.layer + 100)):
                assert hidden_RD is not None
                assert hidden_RD.dtype == np.float32
                assert hidden_RD.tolist() == [[value] * 4] * 2
            is_last = event.layer == RUN.num_layers - 1
            assert (event.last_output_RD is not None) == is_last
            assert event.last_output_RD is None or event.last_output_RD.tolist() == [[RUN.num_layers] * 4] * 2

    running(scenario)


def test_router_inputs_alone_need_no_last_output() -> None:
    (step, *_) = steps_of(list(RUN.events()))

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(TraceWish(1, layer_input=False, router_input=True))
        assert traces.begin_step(StepStart(1, ())) == WantedSamples(1, False, True, routing=False)
        traces.record(step[0])
        for event in step[1:]:
            if isinstance(event, LayerEvent):
                traces.take(sample(1, event.layer, ObservedKind.ROUTER_INPUT))
            traces.record(event)
        recorded, _ = await read(recording, len(step))
        (*_, last) = recorded
        assert isinstance(last, LayerEvent)
        assert (last.layer_input_RD, last.last_output_RD) == (None, None)
        assert last.router_input_RD is not None

    running(scenario)


def test_a_trace_opened_while_a_step_begins_starts_with_the_next_one() -> None:
    first, second, *_ = steps_of(list(RUN.events()))

    async def scenario() -> None:
        traces = recorder()
        assert traces.begin_step(StepStart(1, ())) is None
        recording = traces.open(EVERYTHING)  # the observer has begun the step, the cache has not
        for event in first:
            traces.take(sample(1, 0, ObservedKind.LAYER_INPUT))
            traces.record(event)
        assert play_step(traces, second) is not None
        recorded, _ = await read(recording, len(second))
        assert [event.step for event in recorded if isinstance(event, StepEvent)] == [2]
        assert all(event.rows for event in recorded if isinstance(event, LayerEvent))

    running(scenario)


def test_what_is_noticed_between_two_steps_goes_with_the_next_one() -> None:
    first, second, third, *_ = steps_of(list(RUN.events()))
    (hint,) = [event for event in second if isinstance(event, HintEvent)][:1]

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)
        for event in (*first, hint, *second, *third[:-1]):
            traces.record(event)  # the third step fails in its last layer
        for event in second:
            traces.record(replace(event, step=9) if isinstance(event, StepEvent) else event)
        recorded, _ = await read(recording, len(first) + 2 * len(second) + len(third))
        assert same_event(recorded[len(first)], hint)
        assert [event.step for event in recorded if isinstance(event, StepEvent)] == [1, 2, 3, 9]

    running(scenario)


def heavy_steps(count: int) -> list[list[TraceEvent]]:
    """Steps of a megabyte of routing each."""
    ids_TK = np.zeros((STEP_NBYTES // 4 // RUN.num_layers, 2), np.uint16)
    steps: list[list[TraceEvent]] = []
    for step in range(1, count + 1):
        layers = [LayerEvent(step, step, step, layer, ids_TK, (0,), (), (), 0.0) for layer in range(RUN.num_layers)]
        steps.append([StepEvent(step, step, (StepSpan("r", len(ids_TK), True),)), *layers])
    return steps


def test_a_slow_reader_costs_whole_steps_and_they_are_counted() -> None:
    num_fitting = QUEUE_NBYTES // STEP_NBYTES
    steps = heavy_steps(num_fitting + 11)

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)
        for event in itertools.chain(*steps[:-1]):
            traces.record(event)
        recorded, dropped = await read(recording, num_fitting * (1 + RUN.num_layers))
        assert dropped == 10
        for event in steps[-1]:
            traces.record(event)  # there is room again
        more, dropped = await read(recording, 1 + RUN.num_layers)
        assert dropped == 10
        numbers = [step[0].step for step in steps_of(recorded + more) if isinstance(step[0], StepEvent)]
        assert numbers == [*range(1, num_fitting + 1), num_fitting + 11]
        assert all(len(step) == 1 + RUN.num_layers for step in steps_of(recorded + more))

    running(scenario)


def test_a_step_that_is_left_out_costs_no_samples() -> None:
    num_fitting = QUEUE_NBYTES // STEP_NBYTES
    steps = heavy_steps(num_fitting + 1)

    async def scenario() -> None:
        traces = recorder()
        traces.open(EVERYTHING)
        wanted = [play_step(traces, step) for step in steps]
        assert [each is None for each in wanted] == [False] * num_fitting + [True]

    running(scenario)


def test_a_large_step_comes_in_several_batches() -> None:
    ids_TK = np.zeros((BATCH_NBYTES, 2), np.uint16)

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)
        traces.record(StepEvent(0, 1, ()))
        for layer in range(RUN.num_layers):
            traces.record(LayerEvent(0, 0, 1, layer, ids_TK, (0,), (), (), 0.0))
        batches = recording.batches(as_it_is)
        sizes = [len((await anext(batches)).events) for _ in range(RUN.num_layers)]
        assert sizes == [2, 1, 1]

    running(scenario)


def test_small_steps_travel_together_and_are_converted_off_the_loop() -> None:
    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)
        for event in RUN.events():
            traces.record(event)
        threads: list[int] = []

        def convert(batch: TraceBatch) -> int:
            threads.append(threading.get_ident())
            return len(batch.events)

        assert await anext(recording.batches(convert)) == len(list(RUN.events()))
        assert threads != [threading.get_ident()]

    running(scenario)


def test_one_trace_at_a_time_and_it_ends_at_once() -> None:
    steps = steps_of(list(RUN.events()))

    async def scenario() -> None:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)
        with pytest.raises(Overloaded, match="one at a time"):
            traces.open(EVENTS_ONLY)
        for event in steps[0]:
            traces.record(event)
        assert len((await read(recording, len(steps[0])))[0]) == len(steps[0])
        traces.close(recording)
        traces.close(recording)
        for event in steps[1]:
            traces.record(event)
        assert [batch async for batch in recording.batches(as_it_is)] == []
        other = traces.open(EVENTS_ONLY)
        traces.close(recording)  # an old one closes nobody else's
        with pytest.raises(Overloaded):
            traces.open(EVENTS_ONLY)
        traces.close(other)
        with pytest.raises(Unavailable, match="closed before its first step"):
            await other.beginning()

    running(scenario)


def test_a_reader_that_waits_is_woken_by_the_engine_thread() -> None:
    """Steps from another thread, as many as a long answer has; each arrives whole and in order."""
    run = replace(RUN, num_requests=1, decode_steps=300)
    events = list(run.events())

    async def scenario() -> list[TraceEvent]:
        traces = recorder()
        recording = traces.open(EVENTS_ONLY)

        def play() -> None:
            for event in events:
                traces.record(event)

        engine = threading.Thread(target=play)
        reader = asyncio.create_task(read(recording, len(events)))
        engine.start()
        await recording.beginning()
        recorded, dropped = await reader
        engine.join()
        assert dropped == 0
        return recorded

    recorded = running(scenario)
    assert all(map(same_event, recorded, events))


def test_the_engine_survives_a_loop_that_is_gone() -> None:
    traces = recorder()

    async def open_it() -> None:
        traces.open(EVENTS_ONLY)

    asyncio.run(open_it())
    for event in RUN.events():
        traces.record(event)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ((-1, True, True), "max_rows is -1; allowed: 0 to"),
        ((MAX_ROWS + 1, True, True), "allowed: 0 to 1024"),
        ((0, True, False), "max_rows is 0 with layer_input True"),
        ((3, False, False), "rows of at least one kind, or 0 of none"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish: tuple[int, bool, bool], words: str) -> None:
    rows, layer_input, router_input = wish
    with pytest.raises(ValueError, match=words):
        TraceWish(rows, layer_input=layer_input, router_input=router_input)
