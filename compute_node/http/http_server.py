"""uvicorn on the node's own event loop, on a socket that was bound before anything took long."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from promoe.errors import AlreadyRunning

_BACKLOG: Final = 512
_KEEPALIVE_S: Final = 75
_STOP_GRACE_S: Final = 1


class HttpListener:
    """An address that is ours, where nothing answers yet: who connects waits.

    Args:
        address: `host:port`; port 0 takes a free one.

    Raises:
        AlreadyRunning: it is taken, or not one of this machine's.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._socket = _bound(host.strip("[]"), int(port))
        except OSError as error:
            raise AlreadyRunning(
                f"The HTTP API cannot listen on {address} ({error.strerror}); another process may hold it. "
                "Give another compute.http_listen, or an empty one for none."
            ) from error
        self.address = f"{address.rpartition(':')[0]}:{self._socket.getsockname()[1]}"

    def serve(self, app: ASGIApp) -> "HttpServer":
        """Answers there from now on; needs a running event loop."""
        return HttpServer(app, self._socket)

    def close(self) -> None:
        """Gives the address back."""
        self._socket.close()


class HttpServer:
    """A running server.

    Args:
        app: what answers.
        listener: bound, not yet listening.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEPALIVE_S,
            timeout_graceful_shutdown=_STOP_GRACE_S,
        )
        self._server = _QuietServer(config)
        self._task = asyncio.create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Accepts nobody any more, lets answers be sent for a moment, and returns when all is closed."""
        self._server.should_exit = True
        await self._task


class _QuietServer(uvicorn.Server):
    """Signals are the node's own business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # Not later: a second process could bind the same address until somebody listens there.
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
