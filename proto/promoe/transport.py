"""How a client's calls travel: over gRPC's aio channel, or over its blocking one behind the same coroutines.

The client's logic is written once, as coroutines over a `Transport`. On the blocking transport they never suspend, so
`run_blocking` runs one to its end without an event loop.
"""

import asyncio
import time
import weakref
from collections.abc import Coroutine
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from promoe.errors import DeadlineExceeded, PromoeError, Unavailable
from promoe.rpc import CHANNEL_OPTIONS, domain_error
from promoe.v1 import inference_pb2, inference_pb2_grpc

_Result = TypeVar("_Result")
_Response = TypeVar("_Response", bound=Message)
_Item = TypeVar("_Item", bound=Message, covariant=True)

Metadata: TypeAlias = tuple[tuple[str, str], ...]

INFERENCE_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

# How gRPC itself (not a promoe server) words UNAVAILABLE.
_CONNECTION_ERRORS = (
    "failed to connect",
    "Socket closed",
    "Connection reset",
    "recvmsg",
    "sendmsg",
    "Broken pipe",
    "GOAWAY",
    "DNS resolution",
    "Name resolution",
    "keepalive",
    "ping timeout",
    "Stream removed",
    "Cancelling all calls",
    "empty address list",
)


class Unreachable(Unavailable):
    """Nobody answers at the endpoint, or the connection broke."""


class StreamCall(Protocol[_Item]):
    """An open call with a stream of responses."""

    async def read(self) -> _Item | None:
        """The next message, or None after the last.

        Raises:
            PromoeError: the call failed.
        """
        ...

    def cancel(self) -> None:
        """Ends the call; a waiting `read` raises. Does nothing to a call that is over."""
        ...


class Transport(Protocol):
    """One channel to one compute node. Every method raises PromoeError as the table maps it."""

    async def ask(self, method: str, request: Message, response_type: type[_Response], timeout_s: float) -> _Response:
        """One unary call of the Inference service."""
        ...

    async def is_serving(self, timeout_s: float) -> bool:
        """What the node's health service says of the Inference service."""
        ...

    def stream(
        self,
        method: str,
        request: Message,
        response_type: type[_Response],
        timeout_s: float,
        metadata: Metadata = (),
    ) -> StreamCall[_Response]:
        """Opens a streaming call of the Inference service; failures come with `read`."""
        ...

    async def pause(self, seconds: float) -> None:
        """Waits."""
        ...

    async def close(self) -> None:
        """Ends all calls and the channel."""
        ...


def run_blocking(coroutine: Coroutine[object, object, _Result]) -> _Result:
    """Runs a coroutine over a BlockingTransport to its end."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("_Result", end.value)
    raise AssertionError("a coroutine over the blocking transport suspended")


class AioTransport:
    """Over `grpc.aio`; belongs to the event loop that runs when it is made."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def ask(self, method: str, request: Message, response_type: type[_Response], timeout_s: float) -> _Response:
        """See Transport."""
        try:
            response = await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error
        assert isinstance(response, response_type), f"{method} answers with {response_type}"
        return response

    async def is_serving(self, timeout_s: float) -> bool:
        """See Transport."""
        try:
            response = await self._health.Check(_health_request(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def stream(
        self,
        method: str,
        request: Message,
        response_type: type[_Response],
        timeout_s: float,
        metadata: Metadata = (),
    ) -> StreamCall[_Response]:
        """See Transport."""
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
        return _AioStreamCall(call, self._endpoint)

    async def pause(self, seconds: float) -> None:
        """See Transport."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """See Transport."""
        await self._channel.close()


class _AioStreamCall(Generic[_Response]):
    def __init__(self, call: "grpc.aio.UnaryStreamCall[Message, _Response]", endpoint: str) -> None:
        self._call = call
        self._endpoint = endpoint

    async def read(self) -> _Response | None:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error
        except asyncio.CancelledError:
            # grpc.aio raises this for its own call's cancellation too; only the task's own must go on.
            task = asyncio.current_task()
            if self._call.cancelled() and not (task and task.cancelling()):
                raise Unavailable("The call was cancelled.") from None
            raise
        return None if message is grpc.aio.EOF else cast("_Response", message)

    def cancel(self) -> None:
        self._call.cancel()


class BlockingTransport:
    """Over gRPC's blocking channel; its coroutines never suspend. Usable from several threads."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        channel = grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        # Also when nobody closes it, and before the interpreter ends: a call that gRPC cancels while the interpreter
        # is going down may wait for ever for a thread that is gone.
        self._closer = weakref.finalize(self, channel.close)
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def ask(self, method: str, request: Message, response_type: type[_Response], timeout_s: float) -> _Response:
        """See Transport."""
        try:
            response = getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error
        assert isinstance(response, response_type), f"{method} answers with {response_type}"
        return response

    async def is_serving(self, timeout_s: float) -> bool:
        """See Transport."""
        try:
            response = self._health.Check(_health_request(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def stream(
        self,
        method: str,
        request: Message,
        response_type: type[_Response],
        timeout_s: float,
        metadata: Metadata = (),
    ) -> StreamCall[_Response]:
        """See Transport."""
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
        return _BlockingStreamCall(call, self._endpoint)

    async def pause(self, seconds: float) -> None:
        """See Transport."""
        time.sleep(seconds)

    async def close(self) -> None:
        """See Transport."""
        self._closer()


class _BlockingStreamCall(Generic[_Response]):
    def __init__(self, call: "grpc._CallIterator[_Response]", endpoint: str) -> None:
        self._call = call
        self._endpoint = endpoint

    async def read(self) -> _Response | None:
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise readable_error(error, self._endpoint) from error

    def cancel(self) -> None:
        self._call.cancel()


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)


def readable_error(error: grpc.RpcError, endpoint: str) -> PromoeError:
    """The domain error, where gRPC's own wording of a broken connection becomes a sentence with the endpoint."""
    mapped = domain_error(error)
    text = str(mapped)
    if isinstance(mapped, Unavailable) and any(words in text for words in _CONNECTION_ERRORS):
        # "failed to connect to all addresses; last error: UNKNOWN: …: Connection refused (111)": the end says it.
        return Unreachable(f"There is no connection to {endpoint} ({text.rstrip('.').rpartition(': ')[2]}).")
    if isinstance(mapped, DeadlineExceeded) and text == "Deadline Exceeded":
        return DeadlineExceeded(f"{endpoint} did not answer in time.")
    return mapped
