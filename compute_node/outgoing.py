"""What the engine thread tells a predictor, and a queue for it where a thread sends. Knows no gRPC and no wire."""

import queue
from typing import Final, Protocol, TypeAlias

from compute_node.layer_sample import LayerSample
from promoe.hint import RequestsEnded, StepStart

QUEUE_CAPACITY: Final = 128
"""Messages that wait to be sent: more than one step's of any model served so far; what is older helps nobody."""

OutgoingEvent: TypeAlias = StepStart | RequestsEnded | LayerSample


class Outgoing(Protocol):
    """Takes the engine thread's events; never waits and never raises."""

    @property
    def num_sent(self) -> int:
        """Observations that were handed to whoever carries them."""

    @property
    def num_dropped(self) -> int:
        """Observations that were given up."""

    def send(self, event: OutgoingEvent) -> None:
        """The next event."""


class OutgoingQueue:
    """Bounded: the oldest observations give way. The engine thread puts, the sending thread takes.

    Attributes:
        num_sent: counted by the sending thread.
        num_dropped: counted by the engine thread.
    """

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_dropped = 0
        self._waiting: queue.SimpleQueue[OutgoingEvent | None] = queue.SimpleQueue()

    def send(self, event: OutgoingEvent) -> None:
        """Queues. That requests ended is told in any case."""
        waiting = self._waiting
        ended: list[str] = []
        while waiting.qsize() >= QUEUE_CAPACITY:
            try:
                oldest = waiting.get_nowait()
            except queue.Empty:  # sent meanwhile
                break
            if isinstance(oldest, RequestsEnded):
                ended.extend(oldest.request_ids)
            elif isinstance(oldest, LayerSample):
                self.num_dropped += 1
        if ended:
            waiting.put(RequestsEnded(tuple(ended)))
        waiting.put(event)

    def next_event(self) -> OutgoingEvent | None:
        """Blocks until there is one to send; None at the session's end."""
        return self._waiting.get()

    def end(self) -> None:
        """Ends the sending thread's part; nothing is queued behind it that anybody waits for."""
        self._waiting.put(None)
