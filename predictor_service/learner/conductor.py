"""Decides when a candidate is trained, promoted, given up and rolled back. Pure: it is told things and tells the stage.

                 enough new documents, or asked                trained, published
    GATHERING ───────────────────────────────► TRAINING ───────────────────────────► SHADOWING
      ▲  ▲  ▲                                     │                                   │    │
      │  │  └──────── failed, process lost ───────┘                                   │    │ shown to be better
      │  └──────────── shown to be no better, or undecided for too long ──────────────┘    ▼ (activated)
      └───────────── watched long enough; or the former version shown to be better ──── WATCHING
                                                      (rolled back)

While WATCHING the former version is the shadow. Whatever a person does to the versions in between goes first: the
learner clears its shadow and gathers anew. Not safe for several threads.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from predictor_service.learner.comparison import DocumentDifferences
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.judge import Judge, JudgeSettings, Verdict
from predictor_service.learner.stage import Stage, Training
from predictor_service.shadow.tally import StepComparison
from promoe.errors import InvalidInput, PromoeError

logger = logging.getLogger(__name__)

LEARNER: Final = "the learner"
"""Who, in the history."""

_ENOUGH_DOCUMENTS: Final = "there are enough new documents"


class LearnerState(Enum):
    """What the learner is at; see the module."""

    GATHERING = "gathering"
    TRAINING = "training"
    SHADOWING = "shadowing"
    WATCHING = "watching"


@dataclass(frozen=True)
class Comparison:
    """Two versions that are compared: `shadow` beside `active`."""

    active: str
    shadow: str


class Conductor:
    """One learner's decisions.

    Args:
        config: thresholds.
        stage: the versions.
        training: trains candidates.
        name_candidate: of the active version, a name for a candidate, `name@version`, never the same twice.
    """

    def __init__(
        self, config: LearnerConfig, stage: Stage, training: Training, name_candidate: Callable[[str], str]
    ) -> None:
        self._config = config
        self._stage = stage
        self._training = training
        self._name_candidate = name_candidate
        self._state = LearnerState.GATHERING
        self._is_paused = False
        self._base = ""
        self._compared: Comparison | None = None
        self._judge = Judge(self._promotion())
        self._differences = DocumentDifferences(config.max_document_steps)
        self._documents_seen = 0
        self._documents_at_training: int | None = None
        self._trained_while_paused: tuple[str, Mapping[str, float]] | None = None

    @property
    def state(self) -> LearnerState:
        """What it is at."""
        return self._state

    @property
    def is_paused(self) -> bool:
        """It decides nothing."""
        return self._is_paused

    @property
    def compared(self) -> Comparison | None:
        """What is compared now, if anything is."""
        return self._compared

    def numbers(self) -> dict[str, float]:
        """Of what is compared now, and what would decide it; for status pages."""
        if self._compared is None:
            return {}
        needed = {"e_value_needed": 1 / self._config.alpha, "give_up_e_value_needed": 1 / self._config.give_up_alpha}
        return self._judge.judgement().numbers() | needed

    def gathered(self, documents_seen: int, documents_held: int) -> None:
        """How many documents the learner's process has seen since it was started, and holds now."""
        if documents_seen < self._documents_seen:  # it was started again, and counts anew
            self._documents_at_training = None if self._documents_at_training is None else 0
        self._documents_seen = documents_seen
        if self._is_paused or self._state is not LearnerState.GATHERING:
            return
        since = self._documents_at_training
        is_due = since is None or documents_seen - since >= self._config.documents_between_trainings
        if is_due and documents_held >= self._config.min_documents:
            try:
                self._train(LEARNER, _ENOUGH_DOCUMENTS)
            except PromoeError as error:
                logger.warning("No candidate can be trained: %s", error)
                self._gather()

    def train_now(self, who: str, why: str) -> str:
        """Trains at once, whatever has been gathered; returns the candidate's name.

        Raises:
            InvalidInput: the learner is paused, or is at something else.
            PromoeError: what trains is not there; then it gathers on.
        """
        if self._is_paused:
            raise InvalidInput("The learner is paused; resume it first.")
        if self._state is not LearnerState.GATHERING:
            raise InvalidInput(f"The learner is {self._state.value} already; a training begins when that is over.")
        return self._train(who, why)

    def trained(self, path: str, metrics: Mapping[str, float]) -> None:
        """A candidate's artifact was written."""
        if self._state is not LearnerState.TRAINING:
            logger.info("A candidate came at %s that nobody waits for any more.", path)
            return
        if self._is_paused:
            self._trained_while_paused = (path, metrics)
            return
        if self._is_disturbed():
            return
        try:
            candidate = self._stage.publish(path)
            self._stage.set_shadow(candidate, LEARNER, f"a candidate trained from {self._base}", metrics)
        except PromoeError as error:
            logger.warning("A candidate cannot be tried: %s", error)
            self._gather()
            return
        self._compare(LearnerState.SHADOWING, Comparison(self._base, candidate), self._promotion())

    def failed(self, sentence: str) -> None:
        """The training came to nothing, or the learner's process was lost in between."""
        if self._state is LearnerState.TRAINING:
            logger.warning("No candidate: %s", sentence)
            self._gather()

    def step_compared(self, comparison: StepComparison) -> None:
        """A step of the served traffic; those of other versions than the ones compared now are ignored."""
        compared = self._compared
        if self._is_paused or compared is None or self._is_disturbed():
            return
        if compared == Comparison(comparison.active_version, comparison.shadow_version):
            self._judge_documents(self._differences.add(comparison))

    def requests_ended(self, request_ids: Iterable[str]) -> None:
        """These documents are complete."""
        if self._compared is not None and not self._is_paused and not self._is_disturbed():
            self._judge_documents(self._differences.end(request_ids))

    def pause(self) -> None:
        """Decides nothing until it is resumed; what is compared meanwhile is not counted."""
        self._is_paused = True

    def resume(self) -> None:
        """Goes on where it was, unless somebody changed the active version meanwhile."""
        self._is_paused = False
        waiting, self._trained_while_paused = self._trained_while_paused, None
        if waiting is not None:
            self.trained(*waiting)
        elif self._compared is not None:
            self._is_disturbed()

    def step_aside(self, who: str, why: str) -> None:
        """Somebody took the shadow's place, or clears it: the learner gathers anew, and leaves what is there alone."""
        if self._compared is not None:
            logger.info("The learner steps aside for %s (%s).", who, why)
            self._gather()

    def _train(self, who: str, why: str) -> str:
        self._base = self._stage.active()
        name = self._name_candidate(self._base)
        logger.info("%s is trained from %s, for %s: %s.", name, self._base, who, why)
        self._training.train(self._base, name)
        self._documents_at_training = self._documents_seen
        self._state = LearnerState.TRAINING
        return name

    def _judge_documents(self, differences: Iterable[float]) -> None:
        for difference in differences:
            verdict = self._judge.add(difference)
            if verdict is not Verdict.OPEN:
                self._decide(verdict)
                return

    def _decide(self, verdict: Verdict) -> None:
        compared, numbers = self._compared, self._judge.judgement().numbers()
        assert compared is not None, "what is judged is compared"
        if self._state is LearnerState.SHADOWING and verdict is Verdict.BETTER:
            self._promote(compared, numbers)
        elif self._state is LearnerState.SHADOWING:
            why = "shown to be no better" if verdict is Verdict.NOT_BETTER else "not shown to be better in time"
            self._give_up(f"{compared.shadow} is {why} than {compared.active}", numbers)
        elif verdict is Verdict.BETTER:
            self._roll_back(compared, numbers)
        else:
            self._give_up(f"{compared.active} holds: {compared.shadow} is not shown to be better", numbers)

    def _promote(self, compared: Comparison, numbers: Mapping[str, float]) -> None:
        why = f"{compared.shadow} is shown to be better than {compared.active}"
        try:
            self._stage.activate(compared.shadow, LEARNER, why, numbers, expected_active=compared.active)
        except PromoeError as error:
            logger.warning("%s cannot be promoted: %s", compared.shadow, error)
            self._give_up(f"{compared.shadow} could not be promoted", numbers)
            return
        try:
            self._stage.set_shadow(compared.active, LEARNER, f"watches over {compared.shadow}", numbers)
        except PromoeError as error:
            logger.warning("%s is not watched: %s", compared.shadow, error)
            self._gather()
            return
        self._compare(LearnerState.WATCHING, Comparison(compared.shadow, compared.active), self._watch())

    def _roll_back(self, compared: Comparison, numbers: Mapping[str, float]) -> None:
        why = f"{compared.shadow} is shown to be better than {compared.active}, which took its place"
        try:
            self._stage.rollback(LEARNER, why, numbers, expected_active=compared.active)
        except PromoeError as error:
            logger.warning("%s cannot be rolled back to: %s", compared.shadow, error)
        self._give_up(why, numbers)

    def _give_up(self, why: str, numbers: Mapping[str, float]) -> None:
        """Ends the comparison."""
        try:
            self._stage.clear_shadow(LEARNER, why, numbers)
        except PromoeError as error:
            logger.warning("The shadow cannot be cleared: %s", error)
        self._gather()

    def _is_disturbed(self) -> bool:
        """Somebody else changed the active version: then what was going on is over."""
        expected = self._base if self._compared is None else self._compared.active
        active = self._stage.active()
        if active == expected:
            return False
        numbers = self.numbers()
        if self._compared is not None:
            self._give_up(f"{active} was activated in place of {expected} meanwhile", numbers)
        else:
            logger.info("A candidate of %s is not tried: %s was activated meanwhile.", expected, active)
            self._gather()
        return True

    def _compare(self, state: LearnerState, compared: Comparison, settings: JudgeSettings) -> None:
        self._state, self._compared = state, compared
        self._judge = Judge(settings)
        self._differences = DocumentDifferences(self._config.max_document_steps)

    def _gather(self) -> None:
        self._state, self._compared = LearnerState.GATHERING, None
        self._trained_while_paused = None
        # What came while the candidate was tried counts as new only from now on.
        self._documents_at_training = self._documents_seen

    def _promotion(self) -> JudgeSettings:
        config = self._config
        return JudgeSettings(
            config.min_gain, config.alpha, config.give_up_alpha, config.largest_difference, config.max_documents
        )

    def _watch(self) -> JudgeSettings:
        """The former version's gain over the promoted one, above what is tolerated."""
        config = self._config
        return JudgeSettings(
            config.tolerated_loss, config.alpha, config.give_up_alpha, config.largest_difference, config.watch_documents
        )
