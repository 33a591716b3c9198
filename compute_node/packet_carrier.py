"""Carries a session's messages over a packet socket, on the engine thread itself.

A thread that sent and one that received would take the interpreter's lock from the engine thread, which gives it up at
every torch operation, for longer than a system call takes (DECISIONS.md). So the engine thread sends what it has to
tell, and looks whether something came whenever the expert cache looks around.
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from compute_node.layer_sample import LayerSample
from compute_node.outgoing import QUEUE_CAPACITY, OutgoingEvent
from promoe.errors import DeadlineExceeded, PromoeError, Unavailable
from promoe.hint import RequestsEnded, StepStart
from promoe.packet_channel import PacketChannel

MOST_MESSAGES_A_LOOK: Final = 64
"""A service that never stops must not keep the engine thread here."""


MOST_ENDS_A_MESSAGE: Final = 1024
MOST_ENDS_UNTOLD: Final = 1 << 16
"""Requests that ended and that the service could not be told of; with more the session ends, which ends them all."""


class PacketCarrier:
    """See `Outgoing`; what the kernel has no room for is dropped: while the service is stopped, the newest.

    Args:
        channel: connected and welcomed.
        encode: makes a message of an event whose hidden states are on the host.
        receive: takes one message; raises PromoeError for what ends the session.

    Attributes:
        num_sent, num_dropped: see `Outgoing`.
    """

    def __init__(
        self, channel: PacketChannel, encode: Callable[[OutgoingEvent], bytes], receive: Callable[[bytes], None]
    ) -> None:
        self.num_sent = 0
        self.num_dropped = 0
        self._channel = channel
        self._encode = encode
        self._receive = receive
        # The engine thread sends and looks, the client's thread ends the session.
        self._lock = threading.Lock()
        self._failure: PromoeError | None = None
        self._is_closed = False
        self._ended_ids: deque[str] = deque()
        self._is_step_told = False
        self._num_heard = 0
        self._dropped_then = self._heard_then = 0
        # Hidden states that are still on their way to the host, and what came after them.
        self._waiting: deque[OutgoingEvent] = deque()

    # ---- the engine's thread

    def send(self, event: OutgoingEvent) -> None:
        """Sends as soon as its hidden states are on the host."""
        with self._lock:
            if len(self._waiting) >= QUEUE_CAPACITY:
                # Hidden states that do not come; what waited behind them goes out in its order.
                self._waiting.popleft()
                self.num_dropped += 1
            self._waiting.append(event)
            self._send_waiting()

    def flush(self) -> None:
        """Sends what has become ready."""
        if self._waiting:
            with self._lock:
                self._send_waiting()

    def look(self) -> None:
        """The same, and takes what came."""
        with self._lock:
            self._send_waiting()
            if self._is_over:
                return
            try:
                self._receive_waiting()
            except PromoeError as error:
                self._fail(error)

    # ---- the client's thread

    @property
    def is_stuck(self) -> bool:
        """Since this was asked last nothing was heard, and not everything could be told."""
        is_stuck = self.num_dropped > self._dropped_then and self._num_heard == self._heard_then
        self._dropped_then, self._heard_then = self.num_dropped, self._num_heard
        return is_stuck

    def finish(self) -> PromoeError:
        """Takes what is still there, closes, and says why the session is over."""
        with self._lock:
            self._is_closed = True
        # The engine thread leaves the channel alone now, and does not wait for what follows.
        try:
            # The service's own reason, where it gave one, says more than that nothing could be sent any more.
            while self._receive_waiting():
                pass
        except PromoeError as error:
            if self._failure is None or not isinstance(error, Unavailable):
                self._failure = error
        self._channel.close()
        return self._failure or Unavailable("The predictor ended the session.")

    # ---- either, with the lock

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._failure is not None

    def _send_waiting(self) -> None:
        waiting = self._waiting
        while waiting:
            event = waiting[0]
            if isinstance(event, LayerSample) and event.hidden is not None and not event.hidden.ticket.is_done():
                return
            self._send_one(waiting.popleft())

    def _send_one(self, event: OutgoingEvent) -> None:
        if isinstance(event, RequestsEnded):
            # Told again until there is room: it must not be lost.
            self._ended_ids.extend(event.request_ids)
            self._tell_ends()
        elif isinstance(event, StepStart):
            self._tell_ends()
            self._is_step_told = self._transmit(event)
        elif self._is_step_told and self._transmit(event):
            self.num_sent += 1
        else:
            self.num_dropped += 1

    def _tell_ends(self) -> None:
        ended_ids = self._ended_ids
        while ended_ids and not self._is_over:
            told = tuple(islice(ended_ids, MOST_ENDS_A_MESSAGE))
            if not self._transmit(RequestsEnded(told)):
                break
            for _ in told:
                ended_ids.popleft()
        if len(ended_ids) > MOST_ENDS_UNTOLD:
            self._fail(DeadlineExceeded(f"It could not be told of {len(ended_ids)} requests that have ended."))
        if self._is_over:
            ended_ids.clear()

    def _transmit(self, event: OutgoingEvent) -> bool:
        if self._is_over:
            return False
        try:
            return self._channel.send(self._encode(event))
        except PromoeError as error:
            self._fail(error)
            return False

    def _receive_waiting(self) -> bool:
        """True when more may be waiting; raises PromoeError for what ends the session."""
        for _ in range(MOST_MESSAGES_A_LOOK):
            message = self._channel.receive(0)
            if message is None:
                return False
            self._num_heard += 1
            self._receive(message)
        return True

    def _fail(self, error: PromoeError) -> None:
        """The client's thread wakes and asks why."""
        if self._failure is None:
            self._failure = error
        self._channel.shut_down()
