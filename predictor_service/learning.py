"""The learner within its service: its child process, its decisions, and what they change. A thread of its own.

feed ──► child process ──► trained, status ─┐
shadow's process ──► comparisons ───────────┼──► this object's thread ──► Conductor ──► Stage
admins ──► train, pause, step aside ────────┘
"""

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from predictor_service.artifact import SUFFIX
from predictor_service.catalogue import Catalogue
from predictor_service.feed import Feed
from predictor_service.learner.child import LearnerChild
from predictor_service.learner.conductor import LEARNER, Conductor, LearnerState
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import (
    Answer,
    AskStatus,
    CandidateTrained,
    KnowVersions,
    LearnerStatus,
    Pause,
    Train,
    TrainingFailed,
)
from predictor_service.learners_stage import LearnersStage
from predictor_service.registry import Registry
from predictor_service.shadow.tally import ScoreReport
from predictor_service.stage import Stage
from promoe import predictor_versions
from promoe.errors import DeadlineExceeded, InvalidInput, PromoeError, Unavailable
from promoe.hint import ObservedKind, PredictorVersion
from promoe.predictor_versions import LearnerReport, VersionMetric

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

WISHES: Final = PredictorVersion(
    LEARNER, LEARNER, ObservedKind.ROUTER_INPUT, (), calibrated=False, wants_routing=True, observe_every=1 << 16
)
"""What nodes show for learning, if it goes together with what the active version wants: it costs nothing more then."""

_STATUS_EVERY_S: Final = 2.0
_ASK_S: Final = 60.0
_LOOK_S: Final = 0.5
_FIRST_RESTART_S: Final = 5.0
_LAST_RESTART_S: Final = 300.0


@dataclass(frozen=True)
class LearningSettings:
    """How to learn.

    Attributes:
        config: thresholds and bounds.
        arguments: of the service's own command line, for the child: `--config`, `--set`.
    """

    config: LearnerConfig
    arguments: tuple[str, ...]


class Learning:
    """From `start` until `close`; its methods may be called from several threads.

    Args:
        settings: see LearningSettings.
        registry: takes the candidates.
        stage: the versions.
        catalogue: finds the artifacts of versions.
        feed: what the child listens to.
    """

    def __init__(
        self, settings: LearningSettings, registry: Registry, stage: Stage, catalogue: Catalogue, feed: Feed
    ) -> None:
        self._settings = settings
        self._stage = stage
        self._catalogue = catalogue
        self._feed = feed
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._candidates = tempfile.TemporaryDirectory(prefix="promoe-candidates-")
        self._child: LearnerChild | None = None
        self._status: LearnerStatus | None = None
        self._news = ""
        self._restart_s = _FIRST_RESTART_S
        self._is_asked = False
        self._ask_at_s = time.perf_counter() + _STATUS_EVERY_S
        self._closing = threading.Event()
        self._learners = LearnersStage(stage, registry, self._tell_news)
        self._conductor = Conductor(settings.config, self._learners, _Trainer(self._train), self._name_candidate)
        self._thread = threading.Thread(target=self._run, name="learning", daemon=True)

    def start(self) -> None:
        """Begins to gather."""
        self._stage.listeners.append(self._hear)
        self._stage.versions.gather(WISHES)
        self._thread.start()

    def close(self) -> None:
        """Ends the child; closing twice is allowed."""
        self._closing.set()
        self._events.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._candidates.cleanup()

    def train(self, who: str, why: str) -> bool:
        """Trains as soon as it can be; False while a candidate is trained or tried already."""
        if not who.strip():
            raise InvalidInput("Nobody is named as the one who asks.")

        def ask() -> bool:
            if self._conductor.state is not LearnerState.GATHERING:
                return False
            name = self._conductor.train_now(who, why)
            self._tell_news(f"{name} is trained, for {who}.")
            return True

        return self._ask(ask)

    def pause(self, paused: bool, who: str) -> None:
        """Gathers, trains and decides nothing, or goes on."""
        if not who.strip():
            raise InvalidInput("Nobody is named as the one who asks.")

        def ask() -> None:
            if paused:
                self._conductor.pause()
            else:
                self._conductor.resume()
            self._tell_news(f"{'Paused' if paused else 'Resumed'} by {who}.")
            if self._child is not None:
                self._child.send(Pause(paused))

        self._ask(ask)

    def step_aside(self, who: str, why: str) -> None:
        """Somebody else has disposed of the shadow."""

        def ask() -> None:
            self._learners.leave_shadow()
            self._conductor.step_aside(who, why)

        self._ask(ask)

    def report(self) -> LearnerReport:
        """As it is now."""
        status, conductor = self._status, self._conductor
        state = predictor_versions.LearnerState(conductor.state.value)
        if self._child is None:
            state = predictor_versions.LearnerState.FAILED
        return LearnerReport(
            state=state,
            paused=conductor.is_paused,
            documents=0 if status is None else status.documents,
            tokens=0 if status is None else status.tokens,
            size_bytes=0 if status is None else status.nbytes,
            oldest_s=0.0 if status is None else status.oldest_age_s,
            progress=_metrics(conductor.numbers()),
            news=self._news,
        )

    # ------------------------------------------------------------------ this object's thread

    def _run(self) -> None:
        try:
            self._begin_child()
            while not self._closing.is_set():
                self._await_event()
        finally:
            self._end_child()

    def _await_event(self) -> None:
        try:
            event = self._events.get(timeout=max(0.0, self._ask_at_s - time.perf_counter()))
            if event is not None:
                event()
        except queue.Empty:
            pass
        except (PromoeError, OSError) as error:
            logger.warning("The learner goes on without it: %s", error)
        if time.perf_counter() >= self._ask_at_s:  # however often something else happens
            self._ask_at_s = time.perf_counter() + _STATUS_EVERY_S
            self._ask_status()

    def _ask_status(self) -> None:
        """One question at a time: those that a process that hangs does not read would fill its socket, and block."""
        if not self._is_asked:
            self._is_asked = True
            self._send(AskStatus())

    def _begin_child(self) -> None:
        try:
            child = LearnerChild(self._settings.arguments, Path(self._candidates.name))
        except OSError as error:
            self._lose_child(f"The learner's process cannot be started ({error.strerror}).")
            return
        self._child, self._is_asked = child, False
        announced = self._stage.versions.lineup.announced
        self._send(KnowVersions({announced.version: announced.observed}))
        if self._conductor.is_paused:
            self._send(Pause(True))
        self._feed.add(child.feed)
        threading.Thread(target=self._read, args=(child,), name="learner-answers", daemon=True).start()

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            self._feed.remove(child.feed)
            child.close()

    def _lose_child(self, problem: str) -> None:
        if self._closing.is_set():
            self._end_child()
            return
        logger.warning("%s It is started again in %g s.", problem, self._restart_s)
        # Before its state shows: whoever sees that it failed finds the reason.
        self._tell_news(problem)
        self._end_child()
        self._conductor.failed(problem)
        timer = threading.Timer(self._restart_s, lambda: self._events.put(self._begin_child_again))
        timer.daemon = True
        timer.start()
        self._restart_s = min(2 * self._restart_s, _LAST_RESTART_S)

    def _begin_child_again(self) -> None:
        if self._child is None:
            self._begin_child()

    def _take(self, child: LearnerChild, answer: Answer) -> None:
        if child is not self._child:
            return
        match answer:
            case LearnerStatus():
                self._status, self._is_asked = answer, False
                self._conductor.gathered(answer.documents_seen, answer.documents)
            case CandidateTrained():
                self._restart_s = _FIRST_RESTART_S
                self._tell_news("A candidate was trained.")
                self._conductor.trained(answer.path, answer.metrics)
                if not self._conductor.is_paused:  # else it waits there until the learner goes on
                    Path(answer.path).unlink(missing_ok=True)
            case TrainingFailed():
                self._tell_news(answer.sentence)
                self._conductor.failed(answer.sentence)

    def _take_report(self, report: ScoreReport) -> None:
        if self._stage.versions.canary is not None:
            # Two versions make the hints, and somebody tries one of them: that goes first.
            return
        for comparison in report.comparisons:
            self._conductor.step_compared(comparison)
        if report.ended:
            self._conductor.requests_ended(report.ended)

    def _train(self, base: str, name: str) -> None:
        child = self._child
        if child is None:
            raise Unavailable("The learner's process is gone; it is started again.")
        for former in Path(self._candidates.name).glob(f"*{SUFFIX}"):
            former.unlink(missing_ok=True)
        child.send(Train(self._catalogue.artifact_path(base), name))

    def _name_candidate(self, active: str) -> str:
        """`learned@2` ─► `learned@2.1`, or the number after the largest."""
        name, _, version = active.partition("@")
        if self._catalogue.artifact_path(active) is None:
            name, version = "learned-here", "1"
        root = version.rpartition(".")[0] if version.rpartition(".")[2].isdecimal() and "." in version else version
        # A number that was used is not used again, also where its version was removed.
        used = {info.version for info in self._catalogue.versions()}
        used |= {v for change in self._stage.versions.log.changes() for v in (change.after, change.version)}
        numbers = [v.removeprefix(f"{name}@{root}.") for v in used if v.startswith(f"{name}@{root}.")]
        return f"{name}@{root}.{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"

    def _tell_news(self, news: str) -> None:
        self._news = news
        logger.info("Learning: %s", news)

    # ------------------------------------------------------------------ other threads

    def _hear(self, report: ScoreReport) -> None:
        self._events.put(lambda: self._take_report(report))

    def _read(self, child: LearnerChild) -> None:
        try:
            while True:
                for answer in child.answers():
                    self._events.put(lambda answer=answer: self._take(child, answer))  # type: ignore[misc]
        except PromoeError:
            self._events.put(lambda: self._lose_child_of(child))

    def _lose_child_of(self, child: LearnerChild) -> None:
        if child is self._child:
            self._lose_child("The learner's process ended; its log has the reason.")

    def _send(self, command: AskStatus | Pause | KnowVersions) -> None:
        child = self._child
        if child is None:
            return
        try:
            child.send(command)
        except Unavailable:  # its reading thread notices, too
            return

    def _ask(self, question: Callable[[], _Result]) -> _Result:
        """Asks on this object's thread; raises what it raises, DeadlineExceeded, or Unavailable when it has ended."""
        answers: queue.SimpleQueue[tuple[_Result | None, PromoeError | None]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((question(), None))
            except PromoeError as error:
                answers.put((None, error))

        self._events.put(answer)
        until_s = time.perf_counter() + _ASK_S
        while True:
            try:
                result, error = answers.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if not self._thread.is_alive():
                    raise Unavailable("The learner has ended.") from None
                if time.perf_counter() > until_s:
                    raise DeadlineExceeded(f"The learner did not answer within {_ASK_S:g} s.") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@dataclass(frozen=True)
class _Trainer:
    """See `learner.stage.Training`."""

    begin: Callable[[str, str], None]

    def train(self, base: str, name: str) -> None:
        self.begin(base, name)


def _metrics(numbers: Mapping[str, float]) -> tuple[VersionMetric, ...]:
    return tuple(VersionMetric(name, float(value)) for name, value in numbers.items())
