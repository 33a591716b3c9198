"""The error table, health and reflection over real servers and channels."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from promoe.errors import (
    STATUS_OF_ERROR,
    AlreadyRunning,
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelMismatch,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.rpc import CHANNEL_OPTIONS, MAX_MESSAGE_NBYTES, MAX_SOCKET_PATH_NBYTES, RpcServer, domain_error
from promoe.v1 import expert_store_pb2

STORE_SERVICE = expert_store_pb2.DESCRIPTOR.services_by_name["ExpertStore"].full_name
SHAPES = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
DEADLINE_S = 20.0
PATH = "/promoe.test.Misbehaving"

_T = TypeVar("_T")


class Misbehaving:
    """A service of the four shapes of RPC; each raises `error`, the streaming ones after one response."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.released = asyncio.Event()
        self.may_end = asyncio.Event()

    async def unary(self, _request: object, _context: object) -> bytes:
        """Raises, or answers when it may."""
        if self.error is not None:
            raise self.error
        await self.may_end.wait()
        return b"done"

    async def stream(self, _request: object, _context: object) -> AsyncIterator[bytes]:
        """Answers once, then raises, or goes on until it may end."""
        try:
            yield b"first"
            if self.error is not None:
                raise self.error
            await self.may_end.wait()
            yield b"last"
        finally:
            self.released.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, raw bytes."""
        methods: dict[str, grpc.RpcMethodHandler[object, object]] = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self.unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.unary),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self.stream),
        }
        return grpc.method_handlers_generic_handler("promoe.test.Misbehaving", methods)


@asynccontextmanager
async def running(service: Misbehaving, endpoint: str = "127.0.0.1:0") -> AsyncIterator[tuple[RpcServer, str]]:
    """A started server and its endpoint."""
    server = RpcServer((STORE_SERVICE,))
    server.server.add_generic_rpc_handlers((service.handler(),))
    endpoint = server.listen(endpoint)
    await server.start()
    try:
        yield server, endpoint
    finally:
        await server.stop(0)


def connect(endpoint: str) -> grpc.aio.Channel:
    """A channel with the contract's options."""
    return grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)


def open_stream(channel: grpc.aio.Channel, shape: str = "UnaryStream") -> "grpc.aio.UnaryStreamCall[bytes, bytes]":
    """Calls a streaming method; its one-request form serves for both shapes."""
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"{PATH}/{shape}")
    return method(b"", timeout=DEADLINE_S)


async def call_unary(
    channel: grpc.aio.Channel, name: str, request: bytes = b"", timeout_s: float = DEADLINE_S
) -> bytes:
    """Calls a method with one response; its one-request form serves for both shapes."""
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{PATH}/{name}")
    return await method(request, timeout=timeout_s)


async def call(channel: grpc.aio.Channel, shape: str) -> list[bytes]:
    """Calls one method and returns its responses."""
    if shape.endswith("Stream"):
        return [response async for response in open_stream(channel, shape)]
    return [await call_unary(channel, shape)]


async def failure(error: Exception, shape: str) -> PromoeError:
    """What a client raises when the service raises `error`."""
    async with running(Misbehaving(error)) as (_, endpoint), connect(endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, shape)
        return domain_error(caught.value)


def run(body: Callable[[], Awaitable[_T]]) -> _T:
    """Runs one test's coroutine with a deadline."""

    async def bounded() -> _T:
        return await asyncio.wait_for(body(), 2 * DEADLINE_S)

    return asyncio.run(bounded())


@pytest.mark.parametrize("error_type", [row[0] for row in STATUS_OF_ERROR])
@pytest.mark.parametrize("shape", ["UnaryUnary", "StreamStream"])
def test_client_raises_what_the_server_raised(error_type: type[PromoeError], shape: str) -> None:
    raised = run(lambda: failure(error_type("Größe 3 × 4 fits nowhere."), shape))
    assert type(raised) is error_type
    assert str(raised) == "Größe 3 × 4 fits nowhere."


@pytest.mark.parametrize("shape", SHAPES)
def test_value_errors_are_bad_input(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="promoe.rpc"):
        raised = run(lambda: failure(ValueError("temperature is nan; allowed: 0 to 5"), shape))
    assert [(record.levelno, record.exc_info is None) for record in caplog.records if record.name == "promoe.rpc"] == [
        (logging.INFO, True),
        (logging.DEBUG, False),
    ]
    assert type(raised) is InvalidInput
    assert str(raised) == "temperature is nan; allowed: 0 to 5"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bug_is_logged_and_its_internals_stay_here(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="promoe.rpc"):
        raised = run(lambda: failure(KeyError("internal detail"), shape))
    assert type(raised) is InternalError
    assert "internal detail" not in str(raised)
    (record,) = [record for record in caplog.records if record.name == "promoe.rpc"]
    assert shape in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


@pytest.mark.parametrize("shape", SHAPES)
def test_overloaded_carries_when_to_come_back(shape: str) -> None:
    raised = run(lambda: failure(Overloaded("64 requests wait already.", retry_after_ms=321), shape))
    assert isinstance(raised, Overloaded)
    assert raised.retry_after_ms == 321


def test_a_long_sentence_still_arrives_with_its_status() -> None:
    raised = run(lambda: failure(ValueError("prompt is " + "ä" * 1_000_000), "UnaryUnary"))
    assert type(raised) is InvalidInput
    assert str(raised).startswith("prompt is ä")
    assert len(str(raised)) < 3000


def test_a_stream_delivers_what_came_before_the_error() -> None:
    async def body() -> None:
        service = Misbehaving(Unavailable("The engine stops."))
        async with running(service) as (_, endpoint), connect(endpoint) as channel:
            stream = open_stream(channel)
            assert await stream.read() == b"first"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert type(domain_error(caught.value)) is Unavailable
            assert service.released.is_set()

    run(body)


@pytest.mark.parametrize("shape", ["UnaryStream", "StreamStream"])
def test_a_client_that_leaves_ends_the_servers_stream(shape: str) -> None:
    async def body() -> None:
        service = Misbehaving()
        async with running(service) as (_, endpoint), connect(endpoint) as channel:
            stream = open_stream(channel, shape)
            assert await stream.read() == b"first"
            stream.cancel()
            await asyncio.wait_for(service.released.wait(), DEADLINE_S)

    run(body)


def test_the_callers_deadline_is_a_domain_error() -> None:
    async def body() -> None:
        async with running(Misbehaving()) as (_, endpoint), connect(endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_unary(channel, "UnaryUnary", timeout_s=0.05)
            assert type(domain_error(caught.value)) is DeadlineExceeded

    run(body)


def test_a_call_the_peer_does_not_know_is_a_mismatch() -> None:
    async def body() -> None:
        async with running(Misbehaving()) as (_, endpoint), connect(endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_unary(channel, "Unheard")
            assert type(domain_error(caught.value)) is ModelMismatch

    run(body)


def test_too_large_a_message_is_bad_input_not_overload() -> None:
    async def body() -> None:
        async with running(Misbehaving()) as (_, endpoint), grpc.aio.insecure_channel(endpoint) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_unary(channel, "UnaryUnary", bytes(MAX_MESSAGE_NBYTES + 1))
            raised = domain_error(caught.value)
            assert type(raised) is InvalidInput
            assert str(MAX_MESSAGE_NBYTES) in str(raised)

    run(body)


def test_nobody_listening_is_unavailable() -> None:
    async def body() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            async with connect(f"127.0.0.1:{unused.getsockname()[1]}") as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(channel, "UnaryUnary")
        assert type(domain_error(caught.value)) is Unavailable

    run(body)


def test_health_follows_the_service() -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    async def body() -> None:
        async with running(Misbehaving()) as (server, endpoint), connect(endpoint) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=STORE_SERVICE), timeout=DEADLINE_S)
            assert (await watch.read()).status == not_serving
            await server.set_serving(True)
            assert (await watch.read()).status == serving
            for name in ("", STORE_SERVICE):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
                assert answer.status == serving
            await server.set_serving(False)
            assert (await watch.read()).status == not_serving
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="promoe.v1.Nobody"), timeout=DEADLINE_S)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            watch.cancel()

    run(body)


def test_reflection_lists_services_and_their_schema() -> None:
    async def body() -> None:
        async with running(Misbehaving()) as (_, endpoint), connect(endpoint) as channel:
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=STORE_SERVICE),
            ]
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            answers = [a async for a in stub.ServerReflectionInfo(iter(requests), timeout=DEADLINE_S)]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {STORE_SERVICE, "grpc.health.v1.Health"} <= names
            assert (
                expert_store_pb2.DESCRIPTOR.serialized_pb in answers[1].file_descriptor_response.file_descriptor_proto
            )

    run(body)


def test_a_port_has_one_server() -> None:
    async def body() -> None:
        async with running(Misbehaving()) as (_, endpoint):
            assert not endpoint.endswith(":0")
            with pytest.raises(AlreadyRunning, match=endpoint):
                RpcServer((STORE_SERVICE,)).listen(endpoint)

    run(body)


def test_a_unix_socket_has_one_server_and_can_be_taken_after_it(socket_dir: Path) -> None:
    endpoint = f"unix:{socket_dir / 'store.sock'}"

    async def body() -> None:
        service = Misbehaving()
        service.may_end.set()
        async with running(service, endpoint), connect(endpoint) as channel:
            with pytest.raises(AlreadyRunning, match=r"store\.sock"):
                RpcServer((STORE_SERVICE,)).listen(endpoint)
            assert await call(channel, "UnaryUnary") == [b"done"]
        async with running(service, endpoint) as (_, taken), connect(endpoint) as channel:
            assert taken == endpoint
            assert await call(channel, "UnaryUnary") == [b"done"]

    run(body)


def test_leftovers_of_a_killed_server_do_not_block_the_next(socket_dir: Path) -> None:
    path = socket_dir / "store.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(path))
    (socket_dir / "store.sock.lock").touch()

    async def body() -> None:
        service = Misbehaving()
        service.may_end.set()
        async with running(service, f"unix:{path}") as (_, endpoint), connect(endpoint) as channel:
            assert await call(channel, "UnaryUnary") == [b"done"]

    run(body)


def test_unusable_socket_paths_are_refused_with_the_reason(socket_dir: Path) -> None:
    async def body() -> None:
        server = RpcServer((STORE_SERVICE,))
        with pytest.raises(ValueError, match=f"longer than {MAX_SOCKET_PATH_NBYTES} bytes"):
            server.listen(f"unix:{socket_dir}/{'x' * MAX_SOCKET_PATH_NBYTES}")
        for mark in "%?#":
            with pytest.raises(ValueError, match="which gRPC reads as parts of a URI"):
                server.listen(f"unix:{socket_dir}/a{mark}20.sock")
        (socket_dir / "folder.sock").mkdir()
        with pytest.raises(AlreadyRunning, match=r"Cannot listen on .*folder\.sock"):
            server.listen(f"unix:{socket_dir}/folder.sock")
        (socket_dir / "folder.sock").rmdir()
        server.listen(f"unix:{socket_dir}/folder.sock")
        await server.stop(0)
        with pytest.raises(ValueError, match="No such file or directory"):
            server.listen(f"unix:{socket_dir}/missing/store.sock")

    run(body)


def test_stopping_lets_running_calls_finish_and_refuses_new_ones() -> None:
    async def body() -> None:
        service = Misbehaving()
        async with running(service) as (server, endpoint), connect(endpoint) as channel:
            stream = open_stream(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            assert await stream.read() == b"first"
            await server.set_serving(True)
            while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            stopping = asyncio.create_task(server.stop(DEADLINE_S))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            async with connect(endpoint) as late:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call_unary(late, "UnaryUnary", timeout_s=1)
            assert type(domain_error(caught.value)) is Unavailable
            service.may_end.set()
            assert await stream.read() == b"last"
            await stopping

    run(body)
