"""One look at the node for all who watch it: made at a fixed pace, and only while somebody watches."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from time import perf_counter
from typing import Final

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.event_stream import event
from promoe.errors import Overloaded

INTERVAL_S: Final = 0.5
"""A look takes about a millisecond of the event loop: 0.2 % of its time."""

MOST_LISTENERS: Final = 64


class LiveFeed:
    """Looks, and hands the same encoded look to every listener. Owned by the event loop.

    Args:
        look: the node as it is now.
        is_over: nothing will happen any more; asked after each look, which is the last one then.
        interval_s: between two looks.
    """

    def __init__(
        self, look: Callable[[], JsonDocument], is_over: Callable[[], bool], interval_s: float = INTERVAL_S
    ) -> None:
        self._look = look
        self._is_over = is_over
        self._interval_s = interval_s
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._look_s = 0.0

    @property
    def is_looking(self) -> bool:
        """Somebody listens."""
        return self._task is not None

    def listen(self) -> "Listener":
        """One more listener, which counts when its events are read.

        Raises:
            Overloaded: there are too many.
        """
        if len(self._listeners) >= MOST_LISTENERS:
            raise Overloaded(f"{MOST_LISTENERS} live views are open, which is all that this node keeps up to date.")
        return Listener(self._add, self._remove)

    def _add(self, listener: "Listener") -> None:
        self._listeners.add(listener)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def _remove(self, listener: "Listener") -> None:
        self._listeners.discard(listener)
        if not self._listeners and self._task is not None:
            self._task.cancel()
            self._task = None

    def _encoded_look(self) -> bytes:
        """With the time that the last one took of the event loop: what watching costs is seen by who watches."""
        began_s = perf_counter()
        data = event({**self._look(), "look_s": self._look_s})
        self._look_s = perf_counter() - began_s
        return data

    async def _run(self) -> None:
        try:
            while True:
                data, is_over = self._encoded_look(), self._is_over()
                for listener in self._listeners:
                    listener.tell(data)
                if is_over:
                    return
                await asyncio.sleep(self._interval_s)
        finally:
            for listener in self._listeners:
                listener.leave()


class Listener:
    """One who watches: who is slow misses looks, and nobody waits for it.

    Args:
        add, remove: called when the events begin to be read, and when they end.
    """

    def __init__(self, add: "Callable[[Listener], None]", remove: "Callable[[Listener], None]") -> None:
        self._add = add
        self._remove = remove
        self._news: bytes | None = None
        self._has_left = False
        self._woken = asyncio.Event()

    def tell(self, data: bytes) -> None:
        """The newest look."""
        self._news = data
        self._woken.set()

    def leave(self) -> None:
        """The events end, after the news that has not been read."""
        self._has_left = True
        self._woken.set()

    async def events(self) -> AsyncGenerator[bytes]:
        """Encoded events, until it leaves."""
        self._add(self)
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                news, self._news = self._news, None
                if news is not None:
                    yield news
                if self._has_left:
                    return
        finally:
            self._remove(self)
