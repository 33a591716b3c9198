"""One session with the predictor: which versions were announced, what is allowed, what was counted. Knows no wire.

Of several threads that touch it each counter has one writer at a time: see `HintClient`.
"""

import logging
import time
from dataclasses import dataclass
from typing import Final

from compute_node.outgoing import QUEUE_CAPACITY, Outgoing
from promoe.errors import Overloaded
from promoe.hint import PredictorVersion
from promoe.schema import OUR_SCHEMA
from promoe.trace_events import HintFate

logger = logging.getLogger(__name__)

MAX_ROWS: Final = 16
"""Tokens of a step that are shown to a predictor at most."""

HINTS_PER_OBSERVATION: Final = 8
FREE_HINTS: Final = 1024
MOST_CREDIT: Final = 16384
"""How much a service may say: so many hints for each observation, and the free ones in advance; credit is saved up for
answers to what waits in the service, but not for ever. Reading hints takes time from the engine thread: a service that
floods the node is left alone for a while."""


@dataclass(frozen=True)
class HintTraffic:
    """Counters since the start.

    Attributes:
        observations_sent: handed to gRPC, or to the packet socket.
        observations_dropped: given up because the service, or the way to it, was too slow.
        invalid: hints that no hint of this model can be.
        wrong_version: hints of a version that was not announced.
    """

    observations_sent: int = 0
    observations_dropped: int = 0
    invalid: int = 0
    wrong_version: int = 0

    def __add__(self, other: "HintTraffic") -> "HintTraffic":
        """Of two predictors together."""
        return HintTraffic(
            self.observations_sent + other.observations_sent,
            self.observations_dropped + other.observations_dropped,
            self.invalid + other.invalid,
            self.wrong_version + other.wrong_version,
        )


class HintSession:
    """What was announced and counted, when observations were handed over.

    Args:
        num_layers: MoE layers.
        outgoing: takes what is told.

    Attributes:
        active: the version that is asked now; None before the welcome.
        canary: the version that is asked for some requests; None where there is none.
        announced: the versions whose hints are taken, by name.
        max_rows: that the service wants to see.
        schema: what both ends know; known with the first welcome.
    """

    def __init__(self, num_layers: int, outgoing: Outgoing) -> None:
        self.outgoing = outgoing
        self.active: PredictorVersion | None = None
        self.canary: PredictorVersion | None = None
        self.announced: dict[str, PredictorVersion] = {}
        self.max_rows = MAX_ROWS
        self.schema = OUR_SCHEMA
        self._stride = num_layers + 1
        # When what was handed over, in a ring: (step and layer as one number, seconds).
        self._times: list[tuple[int, float]] = [(-1, 0.0)] * (2 * QUEUE_CAPACITY)
        self._began_s = time.perf_counter()
        self._faults = {HintFate.INVALID: 0, HintFate.WRONG_VERSION: 0}
        self._credit = FREE_HINTS
        self._num_charged = 0

    @property
    def age_s(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began_s

    def add_to(self, past: HintTraffic) -> HintTraffic:
        """The counters before it and its own."""
        return past + HintTraffic(
            observations_sent=self.outgoing.num_sent,
            observations_dropped=self.outgoing.num_dropped,
            invalid=self._faults[HintFate.INVALID],
            wrong_version=self._faults[HintFate.WRONG_VERSION],
        )

    def note_time(self, step: int, layer: int) -> None:
        """An observation of this layer is handed over now; told by the engine thread."""
        key = step * self._stride + layer
        self._times[key % len(self._times)] = (key, time.perf_counter())

    # ---- whoever reads the service's messages

    def welcome(self, active: PredictorVersion, max_rows: int, canary: PredictorVersion | None = None) -> None:
        """Takes the versions that are announced; hints of those before them may still be under way."""
        before, canary_before = self.active, self.canary
        kept = (before, canary_before, active, canary)
        self.announced = {version.version: version for version in kept if version is not None}
        self.max_rows = min(max_rows, MAX_ROWS)
        self.active, self.canary = active, canary
        if canary is not None and (canary_before is None or canary_before.version != canary.version):
            logger.info("%s makes the hints of some requests.", canary.version)
        if before is not None and before.version != active.version:
            logger.info("The predictor's version is %s now; it was %s.", active.version, before.version)

    def charge(self, num_said: int) -> None:
        """Raises Overloaded when the service says more than it was asked for."""
        num_sent = self.outgoing.num_sent
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
