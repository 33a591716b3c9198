"""How promoe's processes serve and call gRPC: channel options, deadlines, errors, health and reflection."""

import fcntl
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from promoe.errors import (
    RETRY_AFTER_METADATA_KEY,
    AlreadyRunning,
    Overloaded,
    PromoeError,
    error_of,
    status_of,
    wire_text,
)

logger = logging.getLogger(__name__)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

if TYPE_CHECKING:
    # gRPC's classes are generic for the type checker only.
    _Handler: TypeAlias = grpc.RpcMethodHandler[_Request, _Response] | None
    CallContext: TypeAlias = grpc.aio.ServicerContext[object, object]
    CallBeginner: TypeAlias = Callable[[CallContext], Awaitable[None]]

INFO_DEADLINE_S: Final = 5.0
"""Handshakes and statistics: answered from memory."""

TOKENIZE_DEADLINE_S: Final = 60.0
"""Text to tokens and back: megabytes of it take seconds, behind those of other callers."""

GENERATE_DEADLINE_S: Final = 3600.0
"""A whole answer, queueing included, unless the caller says otherwise."""

TRACE_DEADLINE_S: Final = 24 * 3600.0
"""A recording, unless the caller says otherwise."""

MAX_MESSAGE_NBYTES: Final = 32 << 20

MAX_SOCKET_PATH_NBYTES: Final = 107
"""Linux's limit for the path of a unix socket."""

_URI_MARKS: Final = frozenset("%?#")

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    # A dead peer is noticed within seconds although nothing is being sent.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # The same again: newer gRPC waits for a ping's answer by this one, a minute by default.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # promoe's endpoints are on this host or its private network: never through an HTTP proxy of the environment.
    ("grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port would share its calls silently.
    ("grpc.so_reuseport", 0),
)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns domain errors into status codes by the table; anything else is a bug: logged, INTERNAL without details.

    Streaming methods are async generators; gRPC's own services (health, reflection) are left alone.

    Args:
        begin_call: awaited first, in the task that serves the call.
    """

    def __init__(self, begin_call: "CallBeginner | None" = None) -> None:
        self._begin_call = begin_call

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler[_Request, _Response]]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler[_Request, _Response]":
        """Wraps the handler's behaviour."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method, self._begin_call),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method, self._begin_call),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream, method, self._begin_call),
                handler.request_deserializer,
                handler.response_serializer,
            )
        assert handler.stream_unary is not None, "a handler has one of four shapes"
        return grpc.stream_unary_rpc_method_handler(
            _guard_unary(handler.stream_unary, method, self._begin_call),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guard_unary(behavior: object, method: str, begin_call: "CallBeginner | None") -> Callable[..., object]:
    call = cast("Callable[[object, CallContext], Awaitable[object]]", behavior)

    async def guarded(request: object, context: "CallContext") -> object:
        try:
            if begin_call is not None:
                await begin_call(context)
            return await call(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # the process edge of every call
            await _abort(context, error, method)
            raise

    return guarded


def _guard_stream(behavior: object, method: str, begin_call: "CallBeginner | None") -> Callable[..., object]:
    call = cast("Callable[[object, CallContext], AsyncGenerator[object]]", behavior)

    async def guarded(request: object, context: "CallContext") -> AsyncIterator[object]:
        try:
            if begin_call is not None:
                await begin_call(context)
            # Closed with the call, not when collected: a client that leaves frees what its stream holds at once.
            async with aclosing(call(request, context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the process edge of every call
            await _abort(context, error, method)

    return guarded


async def _abort(context: "CallContext", error: Exception, method: str) -> None:
    status = status_of(error)
    if status is None:
        logger.error("%s failed", method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "Internal error; the service's log has the details.")
    else:
        logger.info("%s: %s", method, status.name)
        # A ValueError from deep inside may be a bug after all: its traceback is there for who looks for it.
        logger.debug("%s was refused.", method, exc_info=error)
        metadata = ((RETRY_AFTER_METADATA_KEY, str(error.retry_after_ms)),) if isinstance(error, Overloaded) else ()
        await context.abort(status, wire_text(error), metadata)


def domain_error(error: grpc.RpcError) -> PromoeError:
    """What a failed call means to the caller; used by every client as `raise domain_error(e) from e`."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "a failed call carries its status"
    retry_after_ms: int | None = None
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER_METADATA_KEY:
            retry_after_ms = int(value)
    return error_of(error.code(), error.details() or "", retry_after_ms)


class RpcServer:
    """One aio gRPC server with health, reflection and the error table.

    Args:
        service_names: full names, for health and reflection.
        begin_call: awaited first in every call of these.

    The owner registers its servicers on `server`, calls `listen`, then `start`, then `set_serving(True)` when it is
    ready to be used.
    """

    def __init__(self, service_names: tuple[str, ...], begin_call: "CallBeginner | None" = None) -> None:
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor(begin_call)], options=SERVER_OPTIONS)
        self._service_names = service_names
        self._lock_fds: list[int] = []
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection((*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)

    def listen(self, endpoint: str) -> str:
        """Binds `host:port` or `unix:path`; returns the endpoint with the port that was taken.

        Raises:
            ValueError: the path of a unix socket is too long, or not one that gRPC finds again.
            AlreadyRunning: another server holds the socket, or the address cannot be bound.
        """
        lock_fd = lock_socket(endpoint) if endpoint.startswith("unix:") else None
        try:
            port = self.server.add_insecure_port(endpoint)
        except RuntimeError as error:
            if lock_fd is not None:
                os.close(lock_fd)
            raise AlreadyRunning(f"Cannot listen on {endpoint}; another process may hold it ({error}).") from error
        if lock_fd is not None:
            self._lock_fds.append(lock_fd)
            return endpoint
        return f"{endpoint.rpartition(':')[0]}:{port}"

    async def start(self) -> None:
        """Starts answering; health says NOT_SERVING until `set_serving`."""
        await self.set_serving(False)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """Sets the health of the process ("") and of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for `grace_s`, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
        while self._lock_fds:
            os.close(self._lock_fds.pop())


def lock_socket(endpoint: str) -> int:
    """Claims a unix socket's path for this process; gRPC alone would silently take it over from a living server.

    The lock is a file beside the socket, which stays when it is released: removing it would race with the next owner.

    Returns:
        The descriptor that holds the lock until it is closed, by us or by the process's end.
    """
    path = Path(endpoint.removeprefix("unix:").removeprefix("//"))
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_NBYTES:
        raise ValueError(f"The path of the unix socket {path} is longer than {MAX_SOCKET_PATH_NBYTES} bytes.")
    if not _URI_MARKS.isdisjoint(str(path)):
        # A client would look for another path, or none, and wait for a server that is there.
        raise ValueError(f"The path of the unix socket {path} has a %, ? or #, which gRPC reads as parts of a URI.")
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(f"Cannot make a unix socket at {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyRunning(f"Another process serves {endpoint}.") from None
    return fd
