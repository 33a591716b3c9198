"""One stream to the predictor, as three threads see it; knows no gRPC and no wire.

The engine's thread calls `send` and `note_time`, the sending thread `next_event`, the client's thread the rest; each
counter has one writer.
"""

import logging
import queue
import time
from dataclasses import dataclass
from typing import Final, TypeAlias

from compute_node.layer_sample import LayerSample
from promoe.errors import Overloaded
from promoe.hint import PredictorVersion, RequestsEnded, StepStart
from promoe.trace_events import HintFate

logger = logging.getLogger(__name__)

MAX_ROWS: Final = 16
"""Tokens of a step that are shown to a predictor at most."""

QUEUE_CAPACITY: Final = 128
"""Messages that wait to be sent: more than one step's of any model served so far; what is older helps nobody."""

HINTS_PER_OBSERVATION: Final = 8
FREE_HINTS: Final = 1024
MOST_CREDIT: Final = 16384
"""How much a service may say: so many hints for each observation, and the free ones in advance; credit is saved up for
answers to what waits in the service, but not for ever. Reading hints takes the interpreter's lock away from the engine
thread: a service that floods the node is left alone for a while."""

OutgoingEvent: TypeAlias = StepStart | RequestsEnded | LayerSample


@dataclass(frozen=True)
class HintTraffic:
    """Counters since the start.

    Attributes:
        observations_sent: handed to gRPC.
        observations_dropped: given up because the service, or the way to it, was too slow.
        invalid: hints that no hint of this model can be.
        wrong_version: hints of a version that was not announced.
    """

    observations_sent: int = 0
    observations_dropped: int = 0
    invalid: int = 0
    wrong_version: int = 0


class HintSession:
    """What waits to be sent, which versions were announced, when observations were handed over, what is allowed.

    Args:
        num_layers: MoE layers.

    Attributes:
        active: the version that is asked now; None before the welcome.
        announced: the versions whose hints are taken, by name.
        max_rows: that the service wants to see.
        num_sent: observations; counted by the sending thread.
    """

    def __init__(self, num_layers: int) -> None:
        self.active: PredictorVersion | None = None
        self.announced: dict[str, PredictorVersion] = {}
        self.max_rows = MAX_ROWS
        self.num_sent = 0
        self._stride = num_layers + 1
        self._outgoing: queue.SimpleQueue[OutgoingEvent | None] = queue.SimpleQueue()
        # When what was handed over, in a ring: (step and layer as one number, seconds).
        self._times: list[tuple[int, float]] = [(-1, 0.0)] * (2 * QUEUE_CAPACITY)
        self._began_s = time.perf_counter()
        self._num_dropped = 0
        self._faults = {HintFate.INVALID: 0, HintFate.WRONG_VERSION: 0}
        self._credit = FREE_HINTS
        self._num_charged = 0

    @property
    def age_s(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began_s

    def add_to(self, past: HintTraffic) -> HintTraffic:
        """The counters before it and its own."""
        return HintTraffic(
            observations_sent=past.observations_sent + self.num_sent,
            observations_dropped=past.observations_dropped + self._num_dropped,
            invalid=past.invalid + self._faults[HintFate.INVALID],
            wrong_version=past.wrong_version + self._faults[HintFate.WRONG_VERSION],
        )

    # ---- the engine's thread ----

    def send(self, event: OutgoingEvent) -> None:
        """Queues; the oldest observations give way. That requests ended is told in any case."""
        outgoing = self._outgoing
        ended: list[str] = []
        while outgoing.qsize() >= QUEUE_CAPACITY:
            try:
                oldest = outgoing.get_nowait()
            except queue.Empty:  # sent meanwhile
                break
            if isinstance(oldest, RequestsEnded):
                ended.extend(oldest.request_ids)
            elif isinstance(oldest, LayerSample):
                self._num_dropped += 1
        if ended:
            outgoing.put(RequestsEnded(tuple(ended)))
        outgoing.put(event)

    def note_time(self, step: int, layer: int) -> None:
        """An observation of this layer is handed over now."""
        key = step * self._stride + layer
        self._times[key % len(self._times)] = (key, time.perf_counter())

    # ---- the sending thread ----

    def next_event(self) -> OutgoingEvent | None:
        """Blocks until there is one to send; None at the session's end."""
        return self._outgoing.get()

    # ---- the client's thread ----

    def end(self) -> None:
        """Ends the sending thread's part; nothing is queued behind it that anybody waits for."""
        self._outgoing.put(None)

    def welcome(self, active: PredictorVersion, max_rows: int) -> None:
        """Takes the version that is announced; hints of the one before it may still be under way."""
        before = self.active
        self.announced = {kept.version: kept for kept in (before, active) if kept is not None}
        self.max_rows = min(max_rows, MAX_ROWS)
        self.active = active
        if before is not None:
            logger.info("The predictor's version is %s now; it was %s.", active.version, before.version)

    def charge(self, num_said: int) -> None:
        """Raises Overloaded when the service says more than it was asked for."""
        num_sent = self.num_sent
        earned = HINTS_PER_OBSERVATION * (num_sent - self._num_charged)
        self._num_charged = num_sent
        self._credit = min(self._credit + earned, MOST_CREDIT) - num_said
        if self._credit < 0:
            raise Overloaded(
                f"It sent more than {FREE_HINTS} hints and {HINTS_PER_OBSERVATION} for each observation, and is left "
                "alone for a while."
            )

    def refuse(self, fault: HintFate, reason: str) -> None:
        """Counts a hint that is not taken; says so the first time."""
        if self._faults[fault] == 0:
            logger.warning("A hint is dropped (%s), and so will be others like it: %s.", fault.value, reason)
        self._faults[fault] += 1

    def latency_s(self, step: int, layer: int) -> float | None:
        """Since the observation was handed over; None for one that nobody knows (any more)."""
        key = step * self._stride + layer
        known, handed_s = self._times[key % len(self._times)]
        return time.perf_counter() - handed_s if known == key else None
