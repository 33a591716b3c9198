"""Both transports behave alike over real sockets; gRPC's own wording becomes a sentence with the endpoint."""

import asyncio
import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from promoe.errors import DeadlineExceeded, InvalidInput, PromoeError, Unavailable
from promoe.transport import AioTransport, BlockingTransport, StreamCall, Transport, Unreachable, run_blocking
from promoe.v1 import inference_pb2
from tests.promoe.scripted_inference import HELLO, Act, ScriptedInference, ScriptedNode, accepted, serve_in_thread

DEADLINE_S = 20.0
HELLO_TEXT = ["", "Hel", "lo", ""]

Check = Callable[[Transport], Awaitable[None]]


def generate(transport: Transport, timeout_s: float) -> StreamCall[inference_pb2.GenerateResponse]:
    request = inference_pb2.GenerateRequest(text="x")
    return transport.stream("Generate", request, inference_pb2.GenerateResponse, timeout_s)


def on_both(servicer: ScriptedInference, check: Check, endpoint: str | None = None) -> None:
    """Runs the same check over the blocking transport and over asyncio's, against a server or at a dead endpoint."""

    async def over(transport: Transport) -> None:
        try:
            await check(transport)
        finally:
            await transport.close()

    async def over_asyncio() -> None:
        if endpoint is not None:
            await over(AioTransport(endpoint))
            return
        async with ScriptedNode(servicer) as node:
            await over(AioTransport(node.endpoint))

    if endpoint is not None:
        run_blocking(over(BlockingTransport(endpoint)))
    else:
        with serve_in_thread(servicer) as served:
            run_blocking(over(BlockingTransport(served)))
    asyncio.run(over_asyncio())


async def detokenize(transport: Transport, timeout_s: float = DEADLINE_S) -> str:
    request = inference_pb2.DetokenizeRequest(token_ids=[104, 105])
    return (await transport.ask("Detokenize", request, inference_pb2.DetokenizeResponse, timeout_s)).text


async def raised_by(awaitable: Awaitable[object]) -> PromoeError:
    try:
        await awaitable
    except PromoeError as error:
        return error
    raise AssertionError("nothing was raised")


def test_asks_reads_and_looks_at_health() -> None:
    async def check(transport: Transport) -> None:
        assert await detokenize(transport) == "hi"
        assert await transport.is_serving(DEADLINE_S)
        call = generate(transport, DEADLINE_S)
        texts = []
        while (message := await call.read()) is not None:
            texts.append(message.delta.text)
        assert texts == HELLO_TEXT
        await transport.pause(0.0)

    on_both(ScriptedInference(HELLO), check)


def test_raises_what_the_server_raised() -> None:
    servicer = ScriptedInference((InvalidInput("No such thing."),))
    servicer.unary_errors = [InvalidInput("Not this."), InvalidInput("Not this.")]

    async def check(transport: Transport) -> None:
        error = await raised_by(detokenize(transport))
        assert (type(error), str(error)) == (InvalidInput, "Not this.")
        error = await raised_by(generate(transport, DEADLINE_S).read())
        assert (type(error), str(error)) == (InvalidInput, "No such thing.")

    on_both(servicer, check)


def test_an_unavailable_server_is_not_an_unreachable_one() -> None:
    servicer = ScriptedInference(HELLO)
    servicer.unary_errors = [Unavailable("The node is draining."), Unavailable("The node is draining.")]

    async def check(transport: Transport) -> None:
        error = await raised_by(detokenize(transport))
        assert (type(error), str(error)) == (Unavailable, "The node is draining.")

    on_both(servicer, check)


def test_nobody_there_is_unreachable_with_the_endpoint(socket_dir: Path) -> None:
    endpoint = f"unix:{socket_dir}/n.sock"

    async def check(transport: Transport) -> None:
        calls = (
            detokenize(transport),
            transport.is_serving(DEADLINE_S),
            generate(transport, DEADLINE_S).read(),
        )
        for call in calls:
            error = await raised_by(call)
            assert type(error) is Unreachable
            assert str(error) == f"There is no connection to {endpoint} (No such file or directory (2))."

    on_both(ScriptedInference(HELLO), check, endpoint)


def test_a_deadline_and_a_cancellation_end_a_hanging_answer() -> None:
    servicer = ScriptedInference((accepted(), Act.HANG))

    async def check(transport: Transport) -> None:
        late = generate(transport, 0.3)
        assert await late.read() is not None
        error = await raised_by(late.read())
        assert type(error) is DeadlineExceeded
        assert "did not answer in time" in str(error)
        cancelled = generate(transport, DEADLINE_S)
        assert await cancelled.read() is not None
        cancelled.cancel()
        assert isinstance(await raised_by(cancelled.read()), Unavailable)
        cancelled.cancel()

    on_both(servicer, check)


def test_a_coroutine_that_suspends_does_not_belong_on_the_blocking_transport() -> None:
    with pytest.raises(AssertionError, match="suspended"):
        run_blocking(asyncio.sleep(0))


def test_a_client_that_nobody_closed_lets_its_process_end() -> None:
    """With a stream left open and another read to its end, as in a script."""
    with serve_in_thread(ScriptedInference(HELLO)) as served:
        script = (
            "from promoe import Client\n"
            f"client = Client({served!r})\n"
            "streams = [client.generate('hello', max_tokens=3) for _ in range(2)]\n"
            "next(iter(streams[0]))\n"
            "streams[1].finish()\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_transport_that_is_forgotten_closes_its_channel() -> None:
    transport = BlockingTransport("unix:/nowhere.sock")
    closer = transport._closer
    assert closer.alive
    del transport
    gc.collect()
    assert not closer.alive
