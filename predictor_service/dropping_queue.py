"""What waits between reading a node's messages (by a thread of its own over gRPC) and predicting from them."""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class _Entry(Generic[_Item]):
    item: _Item
    droppable: bool


class DroppingQueue(Generic[_Item]):
    """Bounded: when it is full, the oldest droppable item gives way, so that what is predicted from is fresh.

    One thread puts, one gets (it may be the same), anybody may close.

    Args:
        capacity: items that wait at most.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, "a queue has room for an item"
        self._capacity = capacity
        self._entries: deque[_Entry[_Item]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._is_closed = False
        self._failure: Exception | None = None
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_closed(self) -> bool:
        """Nothing more is taken in."""
        return self._is_closed

    def put(self, item: _Item, droppable: bool) -> None:
        """Adds one, behind the others; forgotten when the queue is closed."""
        with self._changed:
            if self._is_closed:
                return
            if len(self._entries) >= self._capacity:
                self._drop_one()
            self._entries.append(_Entry(item, droppable))
            self._changed.notify()

    def get(self) -> _Item | None:
        """The oldest item, waiting for it; None when the queue is closed and empty.

        Raises:
            Exception: what the queue was closed with, at once.
        """
        with self._changed:
            while not self._entries and not self._is_closed:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            return self._entries.popleft().item if self._entries else None

    def close(self, failure: Exception | None = None) -> None:
        """Ends it: after what waits already, or at once with a failure. The first close counts."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._failure = failure
                self._changed.notify()

    def _drop_one(self) -> None:
        """The oldest droppable item; without one the oldest, so that the bound holds whatever the node sends."""
        victim = next((entry for entry in self._entries if entry.droppable), self._entries[0])
        self._entries.remove(victim)
        self.num_dropped += 1
