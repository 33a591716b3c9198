"""Where hints wait for the engine thread: filled by the hint client, emptied at the points where slots are decided."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from promoe.hint import Hint


@dataclass(frozen=True, eq=False)
class ReceivedHint:
    """A hint for this model. `latency_s`: since its observation was handed over, where that is known."""

    hint: Hint
    latency_s: float | None


class HintInbox:
    """Bounded: the newest hints push out the oldest.

    One thread at a time puts, one drains; both ends of a deque are safe without a lock, and looking whether there is
    anything costs the engine thread a few dozen nanoseconds.

    Args:
        capacity: hints that wait at most.

    Attributes:
        look_for_more: called before the inbox is drained, on the thread that drains it: fetches what nobody brings.
        flush: called in its place where nothing more is looked for: sends what nobody else sends.
    """

    def __init__(self, capacity: int = 1024) -> None:
        assert capacity > 0, "an inbox has room for a hint"
        self._waiting: deque[ReceivedHint] = deque()
        self._capacity = capacity
        self._num_overflowed = 0
        self.look_for_more: Callable[[], None] = _nothing
        self.flush: Callable[[], None] = _nothing

    @property
    def num_overflowed(self) -> int:
        """Hints that were pushed out so far."""
        return self._num_overflowed

    def put(self, received: ReceivedHint) -> None:
        """Adds one; the oldest gives way when there is no room."""
        self._waiting.append(received)
        if len(self._waiting) > self._capacity:
            try:
                self._waiting.popleft()
            except IndexError:  # just drained
                return
            self._num_overflowed += 1

    def drain(self, looks_for_more: bool = True) -> list[ReceivedHint]:
        """Takes everything, oldest first."""
        if looks_for_more:
            self.look_for_more()
        else:
            self.flush()
        waiting = self._waiting
        if not waiting:
            return []
        drained: list[ReceivedHint] = []
        # As many as there were at the beginning: a service that never stops must not keep the engine thread here.
        for _ in range(len(waiting)):
            try:
                drained.append(waiting.popleft())
            except IndexError:  # the other thread pushed some out
                break
        return drained


def _nothing() -> None:
    """Where a thread brings and sends."""
