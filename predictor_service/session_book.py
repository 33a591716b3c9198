"""Which sessions are open, and what all sessions since the start have done together."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final, Generic, TypeVar

from predictor_service.dropping_queue import DroppingQueue
from predictor_service.lineup import Lineup
from predictor_service.session import Session, SessionCounters, VersionCost
from promoe.errors import Overloaded, Unavailable
from promoe.hint import PredictorVersion
from promoe.model_spec import ModelSpec

logger = logging.getLogger(__name__)

_Event = TypeVar("_Event")

MOST_COSTS: Final = 64
"""Of versions, over all sessions; there is no end to them."""


@dataclass(frozen=True)
class PredictorStats:
    """Since the service's start, but for `sessions`, which are open now.

    Attributes:
        active: what makes the hints.
        sessions: compute nodes connected.
        observations: that came to the predictor.
        dropped_observations: because a queue was full.
        refused_observations: not of the running step, or with hidden states that are no numbers.
        hints: that were made.
        unsent_hints: those of them that their node left no room for.
        predict_s: time spent predicting.
    """

    active: PredictorVersion
    sessions: int
    observations: int
    dropped_observations: int
    refused_observations: int
    hints: int
    unsent_hints: int
    predict_s: float


@dataclass(frozen=True)
class SessionLimits:
    """What a service allows.

    Attributes:
        max_rows: rows an observation may have.
        max_sessions: sessions open at once.
        max_queued_events: of one session; beyond it the oldest observation is dropped.
    """

    max_rows: int
    max_sessions: int
    max_queued_events: int


@dataclass(frozen=True)
class OpenSession(Generic[_Event]):
    """A session, its number since the service's start, and what waits for it."""

    number: int
    session: Session
    waiting: DroppingQueue[_Event]


class SessionBook(Generic[_Event]):
    """Opens and closes sessions; usable from several threads.

    Args:
        spec: the model whose experts are predicted.
        lineup: who makes the hints of steps that begin now.
        limits: what is allowed.
    """

    def __init__(self, spec: ModelSpec, lineup: Callable[[], Lineup], limits: SessionLimits) -> None:
        self.spec = spec
        self.lineup = lineup
        self.limits = limits
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._open: list[OpenSession[_Event]] = []
        self._closed = SessionCounters()
        self._closed_num_dropped = 0
        self._end: Unavailable | None = None

    @contextmanager
    def opened(self, node: str, max_rows: int) -> Iterator[OpenSession[_Event]]:
        """A new session, until the block is left.

        Raises:
            Overloaded: as many are open as there may be.
            Unavailable: the service is shutting down.
        """
        session = Session(node, self.spec, self.lineup, max_rows)
        entry = OpenSession(next(self._numbers), session, DroppingQueue[_Event](self.limits.max_queued_events))
        with self._lock:
            if self._end is not None:
                raise self._end
            if len(self._open) >= self.limits.max_sessions:
                raise Overloaded(f"The predictor serves {len(self._open)} compute nodes, and no more at once.")
            self._open.append(entry)
        about: dict[str, object] = {"fields": {"node": node, "session": entry.number}}
        logger.info("Node %s is predicted for (session %d).", node, entry.number, extra=about)
        try:
            yield entry
        finally:
            logger.info("Session %d of node %s is over.", entry.number, node, extra=about)
            with self._lock:
                self._open.remove(entry)
                _add(self._closed, session.counters)
                self._closed_num_dropped += entry.waiting.num_dropped

    def end_all(self, end: Unavailable) -> None:
        """Ends every session with this, and every later one."""
        with self._lock:
            self._end = end
            for entry in self._open:
                entry.waiting.close(end)

    def costs(self) -> dict[str, VersionCost]:
        """Of the versions that made hints, over all sessions."""
        total = SessionCounters()
        with self._lock:
            _add(total, self._closed)
            for entry in self._open:
                _add(total, entry.session.counters)
        return total.costs

    def stats(self) -> PredictorStats:
        """Figures of all sessions."""
        total = SessionCounters()
        with self._lock:
            _add(total, self._closed)
            num_dropped = self._closed_num_dropped
            num_open = len(self._open)
            for entry in self._open:
                _add(total, entry.session.counters)
                num_dropped += entry.waiting.num_dropped
        return PredictorStats(
            active=self.lineup().active.version,
            sessions=num_open,
            observations=total.observations,
            dropped_observations=num_dropped,
            refused_observations=total.refused_observations,
            hints=total.hints,
            unsent_hints=total.unsent_hints,
            predict_s=total.predict_s,
        )


def _add(total: SessionCounters, part: SessionCounters) -> None:
    total.observations += part.observations
    total.refused_observations += part.refused_observations
    total.hints += part.hints
    total.unsent_hints += part.unsent_hints
    total.predict_s += part.predict_s
    for version, cost in list(part.costs.items()):
        # What was used last comes last.
        known = total.costs[version] = total.costs.pop(version, VersionCost())
        known.add(cost)
    for version in list(total.costs)[:-MOST_COSTS]:
        del total.costs[version]
