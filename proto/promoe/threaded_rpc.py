"""A gRPC server whose streams each have a thread, for a service that answers in less time than an event loop adds.

The aio server of `promoe.rpc` serves everything else. Measured for one observation and its hint over a unix socket, two
cores: 186 µs here, 263 µs with an event loop between the stream and the thread that predicts (medians, round trip with
the client's share).
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from promoe.errors import RETRY_AFTER_METADATA_KEY, AlreadyRunning, Overloaded, status_of, wire_text
from promoe.rpc import SERVER_OPTIONS, lock_socket

logger = logging.getLogger(__name__)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

if TYPE_CHECKING:
    # gRPC's classes are generic for the type checker only.
    _Handler: TypeAlias = grpc.RpcMethodHandler[_Request, _Response] | None

_SPARE_THREADS: Final = 4
"""For short calls, when every stream there may be is open."""


class ThreadedErrorInterceptor(grpc.ServerInterceptor):
    """`promoe.rpc.ErrorInterceptor` for threads: domain errors by the table, bugs logged and INTERNAL."""

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], _Handler[_Request, _Response]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler[_Request, _Response]":
        """Wraps the handler's behaviour; gRPC's own services (health, reflection) are left alone."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method), handler.request_deserializer, handler.response_serializer
            )
        assert handler.stream_stream is not None, "a threaded service has no calls that only take a stream"
        return grpc.stream_stream_rpc_method_handler(
            _guard_stream(handler.stream_stream, method), handler.request_deserializer, handler.response_serializer
        )


def _guard_unary(behavior: object, method: str) -> Callable[..., object]:
    call = cast("Callable[[object, grpc.ServicerContext], object]", behavior)

    def guarded(request: object, context: grpc.ServicerContext) -> object:
        try:
            return call(request, context)
        except Exception as error:  # the process edge of every call
            _abort(context, error, method)
            raise

    return guarded


def _guard_stream(behavior: object, method: str) -> Callable[..., object]:
    call = cast("Callable[[object, grpc.ServicerContext], Iterator[object]]", behavior)

    def guarded(requests: object, context: grpc.ServicerContext) -> Iterator[object]:
        try:
            yield from call(requests, context)
        except grpc.RpcError:  # the caller has left while its messages were waited for
            raise
        except Exception as error:  # the process edge of every call
            _abort(context, error, method)
            raise

    return guarded


def _abort(context: grpc.ServicerContext, error: Exception, method: str) -> None:
    """Ends the call by raising."""
    if isinstance(error, Overloaded):
        context.set_trailing_metadata(((RETRY_AFTER_METADATA_KEY, str(error.retry_after_ms)),))
    status, text = told(error, method)
    context.abort(status, text)


def told(error: Exception, method: str) -> tuple[grpc.StatusCode, str]:
    """What the peer is told of an error: by the table, or INTERNAL for a bug, which is logged with its traceback."""
    status = status_of(error)
    if status is None:
        logger.error("%s failed", method, exc_info=error)
        return grpc.StatusCode.INTERNAL, "Internal error; the service's log has the details."
    # A ValueError from deep inside may be a bug after all: its traceback is there for who looks for it.
    logger.debug("%s refused with %s", method, status.name, exc_info=error)
    return status, wire_text(error)


class ThreadedRpcServer:
    """One threaded gRPC server with health, reflection and the error table; used like `promoe.rpc.RpcServer`.

    Args:
        service_names: full names, for health and reflection.
        max_streams: streams that may be open at once; the service itself refuses more, with a sentence.
    """

    def __init__(self, service_names: tuple[str, ...], max_streams: int) -> None:
        self._threads = ThreadPoolExecutor(max_streams + _SPARE_THREADS, thread_name_prefix="call")
        self.server = grpc.server(self._threads, interceptors=[ThreadedErrorInterceptor()], options=SERVER_OPTIONS)
        self._service_names = service_names
        self._lock_fds: list[int] = []
        self._health = health.HealthServicer()
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

    def start(self) -> None:
        """Starts answering; health says NOT_SERVING until `set_serving`."""
        self.set_serving(False)
        self.server.start()

    def set_serving(self, serving: bool) -> None:
        """Sets the health of the process ("") and of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            self._health.set(name, status)

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for `grace_s`, then cancels them; returns when all are over."""
        self._health.enter_graceful_shutdown()
        self.server.stop(grace_s).wait()
        self._threads.shutdown()
        while self._lock_fds:
            os.close(self._lock_fds.pop())
