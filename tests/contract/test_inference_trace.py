"""The Trace call through a real server and socket, with the real client: beginning, slow readers, ends and refusals."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest

from compute_node.trace_recorder import QUEUE_NBYTES
from promoe import AsyncClient, InvalidInput, Overloaded
from promoe.hint import StepSpan, StepStart
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.v1 import inference_pb2
from tests.compute_node.hand_engine import HandEngine
from tests.compute_node.tiny_serving import SPEC, Serving, load_tokenizer, serving
from tests.contract.inference_node import until
from tests.promoe.traces import MadeUpRun, same_event

RUN = MadeUpRun(num_layers=SPEC.num_moe_layers)
STEP_NBYTES = 1 << 20

_T = TypeVar("_T")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Serving], Awaitable[_T]]], _T]:
    tokenizer = load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))

    def run_scenario(scenario: Callable[[Serving], Awaitable[_T]]) -> _T:
        async def whole() -> _T:
            async with serving(HandEngine(), tokenizer) as server:
                return await scenario(server)

        return asyncio.run(asyncio.wait_for(whole(), 60))

    return run_scenario


Run = Callable[[Callable[[Serving], Awaitable[None]]], None]


def play(server: Serving, events: Iterable[TraceEvent]) -> None:
    """The engine's part."""
    for event in events:
        if isinstance(event, StepEvent):
            server.traces.begin_step(StepStart(event.step, event.spans))
        server.traces.record(event)


def test_a_trace_begins_with_what_a_replay_must_know(run: Run) -> None:
    async def scenario(server: Serving) -> None:
        async with AsyncClient(server.endpoint) as client, client.trace() as trace:
            await trace.wait_until_open()
            play(server, RUN.events())
            header = await trace.header()
            info = await client.info()
            assert (header.service, header.model, header.device) == (info.service, info.model, info.device)
            assert header.shape == info.expert_cache
            assert header.blob_nbytes == SPEC.layout.blob_nbytes
            assert (header.resident, header.history_json) == ((5, -1), '{"uses": 2}')
            assert header.link_bytes_per_s == 18 / 0.25
            assert header.began_unix_s > 1.7e9

    run(scenario)


def test_events_come_in_their_order(run: Run) -> None:
    events = list(RUN.events(hidden=False))

    async def scenario(server: Serving) -> None:
        async with AsyncClient(server.endpoint) as client, client.trace() as trace:
            await trace.wait_until_open()
            play(server, events)
            read: list[TraceEvent] = []
            while len(read) < len(events):
                batch = await trace.next_batch()
                assert batch is not None
                read.extend(batch.events)
            assert all(map(same_event, read, events))

    run(scenario)


def test_times_count_from_the_beginning(run: Run) -> None:
    events = list(RUN.events())

    async def scenario(server: Serving) -> None:
        async with AsyncClient(server.endpoint) as client, client.trace() as trace:
            await trace.wait_until_open()
            play(server, [replace(event, at_s=event.at_s + 100) for event in events])
            read: list[TraceEvent] = []
            while len(read) < len(events):
                batch = await trace.next_batch()
                assert batch is not None
                read.extend(batch.events)
            assert [event.at_s for event in read] == pytest.approx([event.at_s for event in events])
            assert [type(event) for event in read] == [type(event) for event in events]

    run(scenario)


def heavy_step(step: int) -> list[TraceEvent]:
    """A megabyte of routing."""
    ids_TK = np.zeros((STEP_NBYTES // 4 // RUN.num_layers, 2), np.uint16)
    layers = [LayerEvent(step, step, step, layer, ids_TK, (0,), (), (), 0.0) for layer in range(RUN.num_layers)]
    return [StepEvent(step, step, (StepSpan("r", len(ids_TK), True),)), *layers]


def test_a_slow_reader_misses_whole_steps_that_are_counted(run: Run) -> None:
    """What fits the queue and the sockets' buffers comes; the engine waits for nobody."""

    async def scenario(server: Serving) -> None:
        steps = itertools.count(1)

        def play_step() -> int:
            step = next(steps)
            play(server, heavy_step(step))
            return step

        call = server.stub.Trace(inference_pb2.TraceRequest(), timeout=60)
        await _read(call)
        for _ in range(2 * num_fitting):
            play_step()
            await asyncio.sleep(0)
        seen = _Seen()
        while len(seen.steps) < num_fitting:
            seen.add(await _read(call))
        last = play_step()  # there is room again
        while seen.steps[-1] != last or seen.num_layers < RUN.num_layers * len(seen.steps):
            seen.add(await _read(call))
        call.cancel()
        assert seen.dropped_steps >= num_fitting // 2
        assert len(seen.steps) + seen.dropped_steps == last
        assert seen.steps == sorted(set(seen.steps))
        assert seen.num_layers == RUN.num_layers * len(seen.steps)

    num_fitting = QUEUE_NBYTES // STEP_NBYTES
    run(scenario)


@dataclass
class _Seen:
    """What a reader has got so far."""

    steps: list[int] = field(default_factory=list)
    num_layers: int = 0
    dropped_steps: int = 0

    def add(self, message: inference_pb2.TraceResponse) -> None:
        self.steps += [event.step.start.step for event in message.events if event.HasField("step")]
        self.num_layers += sum(event.HasField("layer") for event in message.events)
        self.dropped_steps = message.dropped_steps


async def _read(
    call: "grpc.aio.UnaryStreamCall[inference_pb2.TraceRequest, inference_pb2.TraceResponse]",
) -> inference_pb2.TraceResponse:
    message = await call.read()
    assert isinstance(message, inference_pb2.TraceResponse), "the trace goes on"
    return message


def test_a_second_trace_is_refused_until_the_first_reader_has_gone(run: Run) -> None:
    async def scenario(server: Serving) -> None:
        async with AsyncClient(server.endpoint) as client:
            first = client.trace()
            await first.wait_until_open()
            with pytest.raises(Overloaded, match="one at a time"):
                await client.trace().wait_until_open()
            first.cancel()
            await until(lambda: not server.traces.is_recording)
            second = client.trace()
            await second.wait_until_open()
            second.cancel()
            await until(lambda: not server.traces.is_recording)

    run(scenario)


def test_a_reader_that_leaves_before_the_first_step_ends_the_recording(run: Run) -> None:
    async def scenario(server: Serving) -> None:
        call = server.stub.Trace(inference_pb2.TraceRequest(), timeout=60)
        await until(lambda: server.traces.is_recording)
        call.cancel()
        await until(lambda: not server.traces.is_recording)

    run(scenario)


def test_wishes_that_make_no_sense_are_refused(run: Run) -> None:
    async def scenario(server: Serving) -> None:
        async with AsyncClient(server.endpoint) as client:
            with pytest.raises(InvalidInput, match="max_rows is 0 with layer_input True"):
                await client.trace(layer_input=True).header()
            with pytest.raises(InvalidInput, match="allowed: 0 to 1024"):
                await client.trace(layer_input=True, max_rows=5000).header()
        assert not server.traces.is_recording
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.stub.Trace(inference_pb2.TraceRequest.FromString(b"\x78\x01"), timeout=60).read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(scenario)
