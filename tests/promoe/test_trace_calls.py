"""Both clients read a trace over real sockets: header first, then batches, until somebody ends it."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from promoe import AsyncClient, Client, InternalError, InvalidInput, Overloaded, Unavailable
from promoe.trace_events import TraceBatch, TraceEvent
from promoe.trace_wire import encode_batch
from promoe.typed_message import encode_message
from promoe.v1 import inference_pb2
from tests.promoe.scripted_inference import HELLO, Act, ScriptedInference, Step, serve_in_thread
from tests.promoe.traces import MadeUpRun, same_event

RUN = MadeUpRun()
EVENTS = list(RUN.events(hidden=True))
DEADLINE_S = 20.0


def header() -> inference_pb2.TraceResponse:
    return inference_pb2.TraceResponse(header=encode_message(RUN.header(), inference_pb2.TraceHeader))


def batch(*events: TraceEvent, dropped_steps: int = 0) -> inference_pb2.TraceResponse:
    return encode_batch(TraceBatch(events, dropped_steps))


OPENED = inference_pb2.TraceResponse()
TWO_BATCHES: tuple[Step, ...] = (OPENED, header(), batch(*EVENTS[:30]), batch(*EVENTS[30:], dropped_steps=2), Act.HANG)


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def client(node: ScriptedInference) -> Iterator[Client]:
    with serve_in_thread(node) as endpoint, Client(endpoint) as client:
        yield client


def test_a_trace_is_read_until_it_is_ended(node: ScriptedInference, client: Client) -> None:
    node.trace_script = TWO_BATCHES
    events: list[TraceEvent] = []
    with client.trace(max_rows=7, layer_input=True, deadline_s=DEADLINE_S) as trace:
        assert trace.header() == RUN.header()
        assert trace.header() == RUN.header()
        for read in trace:
            events.extend(read.events)
            if len(events) == len(EVENTS):
                assert read.dropped_steps == 2
                trace.cancel()
    assert all(map(same_event, events, EVENTS))
    assert node.hung_up.wait(DEADLINE_S)
    assert node.trace_requests == [inference_pb2.TraceRequest(max_rows=7, layer_input=True)]


def test_asyncio_reads_the_same(node: ScriptedInference) -> None:
    node.trace_script = TWO_BATCHES

    async def read(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client, client.trace(router_input=True, max_rows=1) as trace:
            events: list[TraceEvent] = []
            async for read in trace:
                events.extend(read.events)
                if len(events) == len(EVENTS):
                    break
            assert await trace.header() == RUN.header()
            assert all(map(same_event, events, EVENTS))

    with serve_in_thread(node) as endpoint:
        asyncio.run(asyncio.wait_for(read(endpoint), DEADLINE_S))
        assert node.hung_up.wait(DEADLINE_S)
    assert node.trace_requests[0].router_input


def test_another_thread_ends_a_trace_that_waits(node: ScriptedInference, client: Client) -> None:
    trace = client.trace(deadline_s=DEADLINE_S)

    def end() -> None:
        node.hanging.wait(DEADLINE_S)
        trace.cancel()

    threading.Thread(target=end).start()
    assert list(trace) == []
    with pytest.raises(Unavailable, match="ended before it began"):
        trace.header()


def test_it_is_known_when_the_node_records(node: ScriptedInference, client: Client) -> None:
    node.trace_script = (OPENED, Act.HANG)
    with client.trace(deadline_s=DEADLINE_S) as trace:
        trace.wait_until_open()
        trace.wait_until_open()
        assert node.hanging.wait(DEADLINE_S)
        trace.cancel()
        with pytest.raises(Unavailable, match="ended before its first step"):
            trace.header()


def test_a_trace_that_was_cancelled_before_it_began_is_empty(client: Client) -> None:
    trace = client.trace(deadline_s=DEADLINE_S)
    trace.cancel()
    assert list(trace) == []


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ((Overloaded("One at a time."),), Overloaded, "One at a time"),
        ((InvalidInput("max_rows is 9"),), InvalidInput, "max_rows is 9"),
        ((OPENED, header(), Act.END), Unavailable, "ended the trace"),
        ((OPENED, Act.END), Unavailable, "ended the trace"),
        ((Act.END,), Unavailable, "ended the trace"),
        ((OPENED, batch(*EVENTS[:2]), Act.HANG), InternalError, "does not begin with its header"),
        (
            (OPENED, header(), inference_pb2.TraceResponse(events=[inference_pb2.TraceEvent()])),
            InternalError,
            "has an event that is none: event is not set",
        ),
    ],
)
def test_failures_are_raised_and_never_retried(
    node: ScriptedInference, client: Client, script: tuple[Step, ...], error: type[Exception], words: str
) -> None:
    node.trace_script = script
    with pytest.raises(error, match=words):
        list(client.trace(deadline_s=DEADLINE_S))
    assert len(node.trace_requests) == 1


def test_a_count_of_rows_below_zero_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="max_rows is -1"):
        client.trace(max_rows=-1)
