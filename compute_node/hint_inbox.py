"""Where hints wait for the engine thread: filled by the hint client, emptied at the points where slots are decided."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from promoe.hint import Hint


@dataclass(frozen=True, eq=False)
class ReceivedHint:
    """A hint for this model.

    Attributes:
        latency_s: since its observation was handed over, where that is known.
        is_calibrated: its scores are probabilities, not just an order.
    """

    hint: Hint
    latency_s: float | None
    is_calibrated: bool = True


class HintTaker(Protocol):
    """Takes a predictor's hints, one thread at a time."""

    def put(self, received: ReceivedHint) -> None:
        """The next one; never waits and never raises."""


class HintInbox:
    """Bounded: the newest hints push out the oldest.

    One thread at a time puts, one drains; both ends of a deque are safe without a lock, and looking whether there is
    anything costs the engine thread a few dozen nanoseconds.

    Args:
        capacity: hints that wait at most.

    Attributes:
        look_for_more: called before the inbox is drained, on the thread that drains it: fetches what nobody brings.
        flush: called in its place where nothing more is looked for: sends what nobody else sends.
        calibrate: makes probabilities of scores that are none, on the thread that drains.
    """

    def __init__(self, capacity: int = 1024) -> None:
        assert capacity > 0, "an inbox has room for a hint"
        self._waiting: deque[ReceivedHint] = deque()
        self._capacity = capacity
        self._num_overflowed = 0
        self.look_for_more: Callable[[], None] = _nothing
        self.flush: Callable[[], None] = _nothing
        self.calibrate: Callable[[Hint], Hint] = _as_it_is

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
                received = waiting.popleft()
            except IndexError:  # the other thread pushed some out
                break
            if not received.is_calibrated:
                received = ReceivedHint(self.calibrate(received.hint), received.latency_s)
            drained.append(received)
        return drained


class HintTap:
    """Between one predictor and the inbox: lets its hints through, or keeps them back; counts either way.

    Args:
        inbox: behind it.

    Attributes:
        is_open: set by the engine thread, between two steps.
        num_taken: hints that went through.
        num_withheld: hints that did not.
    """

    def __init__(self, inbox: HintInbox) -> None:
        self.is_open = False
        self.num_taken = 0
        self.num_withheld = 0
        self._inbox = inbox

    def put(self, received: ReceivedHint) -> None:
        """See HintTaker."""
        if self.is_open:
            self.num_taken += 1
            self._inbox.put(received)
        else:
            self.num_withheld += 1


def _as_it_is(hint: Hint) -> Hint:
    """Where nobody reads scores."""
    return hint


def _nothing() -> None:
    """Where a thread brings and sends."""
