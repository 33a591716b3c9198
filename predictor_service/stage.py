"""Versions at work: which make the hints, which one looks on, and how good they are. What admins and a learner talk to.

Scores are made in a process of its own (`predictor_service.shadow`), which runs while there is a shadow or somebody
watches: so a version that is tried can neither slow the hints down nor bring the service down.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from predictor_service.feed import Feed
from predictor_service.predictor import Predictor
from predictor_service.session import VersionCost
from predictor_service.shadow.process import ShadowProcess, ShadowSource
from predictor_service.shadow.tally import MOST_TALLIES, ScoreReport, VersionTally
from predictor_service.version_log import Wish
from predictor_service.versions import Versions
from promoe.errors import PromoeError, Unavailable
from promoe.predictor_versions import QualityReport, VersionChange, VersionQuality, VersionState

logger = logging.getLogger(__name__)

_ORDER: Final = (
    VersionState.ACTIVE,
    VersionState.CANARY,
    VersionState.SHADOW,
    VersionState.PREVIOUS,
    VersionState.AVAILABLE,
)


@dataclass
class _Gain:
    """Of the shadow, over steps that it was compared in."""

    comparisons: int = 0
    total: float = 0.0


class Stage:
    """One service's versions and their scores; usable from several threads.

    Args:
        versions: what was chosen.
        feed: what the scoring process listens to.
        source: where it finds versions.
        costs: of the versions that made hints.

    Attributes:
        listeners: are told of every report, on a thread that must not be kept.
    """

    def __init__(
        self, versions: Versions, feed: Feed, source: ShadowSource, costs: Callable[[], Mapping[str, VersionCost]]
    ) -> None:
        self.versions = versions
        self.listeners: list[Callable[[ScoreReport], None]] = []
        self._feed = feed
        self._source = source
        self._costs = costs
        # Starting and ending processes, one after the other; what is counted has a lock of its own.
        self._staging = threading.RLock()
        self._counting = threading.Lock()
        self._process: ShadowProcess | None = None
        self._num_watchers = 0
        self._is_closed = False
        self._before: dict[str, VersionTally] = {}
        self._running: dict[str, VersionTally] = {}
        self._faults: dict[str, str] = {}
        self._gain = _Gain()
        self._scored_s = 0.0
        self._began_s = 0.0

    def activate(self, version: str, wish: Wish, canary_share: float | None = None) -> VersionChange | None:
        """See `Versions.activate` and `Versions.activate_canary`."""
        with self._staging:
            if canary_share is not None:
                return self.versions.activate_canary(version, canary_share, wish)
            change = self.versions.activate(version, wish)
            self._settle_what_is_done()
            return change

    def rollback(self, wish: Wish) -> VersionChange:
        """See `Versions.rollback`."""
        with self._staging:
            change = self.versions.rollback(wish)
            self._settle_what_is_done()
            return change

    def set_shadow(self, version: str, wish: Wish) -> VersionChange | None:
        """Lets a version look on; None when it does already.

        Raises:
            PromoeError: see `Versions.set_shadow` and `ShadowProcess`; nothing has changed then.
        """
        with self._staging:
            self._check_open()
            try:
                return self.versions.set_shadow(version, wish, self._begin)
            finally:  # also where it could not be written down: then what was begun is not wanted
                self._settle_what_is_done()

    def clear_shadow(self, wish: Wish) -> VersionChange | None:
        """Nobody looks on any more; None when nobody did."""
        with self._staging:
            change = self.versions.clear_shadow(wish)
            self._settle_what_is_done()
            return change

    @contextmanager
    def watching(self) -> Iterator[Callable[[], QualityReport]]:
        """Hints are scored until the block is left; yields what tells the scores.

        Raises:
            PromoeError: see `ShadowProcess`.
        """
        with self._staging:
            self._check_open()
            self._num_watchers += 1
            try:
                self._settle()
            except PromoeError:
                self._num_watchers -= 1
                raise
        try:
            yield self.report
        finally:
            with self._staging:
                self._num_watchers -= 1
                self._settle_what_is_done()

    def report(self) -> QualityReport:
        """As it is now."""
        states = self._states()
        with self._counting:
            tallies = _sum(self._before, self._running)
            gain = _Gain(self._gain.comparisons, self._gain.total)
            scored_s = self._scored_s + (time.perf_counter() - self._began_s if self._process is not None else 0.0)
            faults = dict(self._faults)
        for version, cost in self._costs().items():
            if version in tallies and not tallies[version].observations:
                tallies[version] = replace(tallies[version], observations=cost.observations, predict_s=cost.predict_s)
        qualities = [
            _quality(
                version, states.get(version, VersionState.AVAILABLE), tallies.get(version), faults.get(version, "")
            )
            for version in {**states, **tallies, **faults}
        ]
        qualities.sort(key=lambda quality: (_ORDER.index(quality.state), quality.version))
        mean = gain.total / gain.comparisons if gain.comparisons else 0.0
        return QualityReport(scored_s, tuple(qualities), gain.comparisons, mean)

    def close(self) -> None:
        """Ends the scoring; closing twice is allowed."""
        with self._staging:
            self._is_closed = True
            self._end()

    def _states(self) -> dict[str, VersionState]:
        versions = self.versions
        canary = versions.canary
        known = (
            (versions.previous, VersionState.PREVIOUS),
            (versions.shadow, VersionState.SHADOW),
            (None if canary is None else canary.predictor, VersionState.CANARY),
            (versions.active, VersionState.ACTIVE),
        )
        return {predictor.version.version: state for predictor, state in known if predictor is not None}

    # ------------------------------------------------------------------ the process, under `_staging`

    def _settle(self) -> None:
        """Runs the process that is wanted now, and no other; raises what keeps it from running."""
        shadow = self.versions.shadow
        wanted = None if shadow is None else shadow.version.version
        if wanted is None and self._num_watchers:
            wanted = ""
        if self._process is not None and (self._is_closed or self._process.version != wanted):
            self._end()
        try:
            if self._process is None and wanted is not None and not self._is_closed:
                self._start(wanted)
        finally:
            self.versions.show_more(is_scored=self._process is not None)

    def _settle_what_is_done(self) -> None:
        """A change that was made and written down stands, whatever becomes of who scores it."""
        try:
            self._settle()
        except PromoeError as error:
            logger.warning("Nothing is scored for now: %s", error)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable("The predictor service is shutting down.")

    def _begin(self, candidate: Predictor) -> None:
        self._start(candidate.version.version)

    def _start(self, version: str) -> None:
        """In place of the one that runs, once it listens."""
        with self._counting:
            self._faults.pop(version, None)
        process = ShadowProcess(self._source, version, self._feed, self._take, self._fail)
        self._end()
        with self._counting:
            self._process, self._gain, self._began_s = process, _Gain(), time.perf_counter()

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        process.close()
        with self._counting:
            self._before = dict(list(_sum(self._before, self._running).items())[-MOST_TALLIES:])
            self._running = {}
            self._scored_s += time.perf_counter() - self._began_s
            self._process = None

    # ------------------------------------------------------------------ the process's thread

    def _take(self, process: ShadowProcess, report: ScoreReport) -> None:
        with self._counting:
            if process is not self._process:
                return
            self._running = report.tallies
            self._gain.comparisons += len(report.comparisons)
            self._gain.total += sum(compared.shadow_score - compared.active_score for compared in report.comparisons)
        for listener in self.listeners:
            listener(report)

    def _fail(self, process: ShadowProcess, problem: str) -> None:
        with self._counting:
            if process.version:
                self._faults[process.version] = problem
        # Not on the process's own thread, which `close` waits for.
        threading.Thread(target=self._give_up, args=(process, problem), name="shadow-end", daemon=True).start()

    def _give_up(self, process: ShadowProcess, problem: str) -> None:
        with self._staging:
            if process is not self._process:
                return
            self._end()
            try:
                if process.version:
                    self.versions.clear_shadow(Wish("the service", problem))
                self._settle()
            except PromoeError as error:
                logger.warning("%s", error)


def _sum(*parts: Mapping[str, VersionTally]) -> dict[str, VersionTally]:
    total: dict[str, VersionTally] = {}
    for part in parts:
        for version, tally in part.items():
            total.setdefault(version, VersionTally()).add(tally)
    return total


def _quality(version: str, state: VersionState, tally: VersionTally | None, fault: str) -> VersionQuality:
    counts = tally or VersionTally()
    return VersionQuality(
        version=version,
        state=state,
        steps=counts.steps,
        layers=counts.layers,
        hinted=counts.hinted,
        correct=counts.correct,
        ready=counts.ready,
        routed=counts.routed,
        found=counts.found,
        observations=counts.observations,
        predict_s=counts.predict_s,
        fault=fault,
    )
