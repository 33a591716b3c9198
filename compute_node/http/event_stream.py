"""Server-sent events whose client may leave: it is noticed at once, not when the next event is sent."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEPALIVE: Final = b": keepalive\n\n"
"""A comment: clients pass over it, and what is between us and them sees that the connection lives."""

DONE: Final = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event with JSON data."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Streams events, and calls back as soon as the client is gone; the events should end then.

    Args:
        events: encoded events.
        on_disconnect: called at most once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], on_disconnect: Callable[[], None]) -> None:
        super().__init__()
        self._events = events
        self._on_disconnect = on_disconnect
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        # nginx would collect the events before it passes them on.
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Response."""
        async with calling_on_disconnect(receive, self._on_disconnect), aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def calling_on_disconnect(receive: Receive, callback: Callable[[], None]) -> AsyncIterator[None]:
    """Calls back when the client goes while this is entered; the body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        callback()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
