"""What the learner does next: decisions only. Who carries them out tells what came of it.

              enough is new                  published                  shown to be better
    GATHERING ─────────────► TRAINING ─────────────────► SHADOWING ────────────────────────► WATCHING
        ▲                        │ it fails                  │ is not, or somebody             │ the one before is
        │                        │                           │ changed the versions            │ better: rolled back
        └────────────────────────┴───────────────────────────┴─────────────────────────────────┘ or watched enough

While it watches, the version before is the shadow. Knows no processes, no wire and no clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.judge import Judge, Verdict
from predictor_service.learner.stretch import Stretches
from predictor_service.shadow.tally import StepComparison
from promoe.predictor_versions import VersionMetric


class LearnerState(Enum):
    """See the module."""

    GATHERING = "gathering"
    TRAINING = "training"
    SHADOWING = "shadowing"
    WATCHING = "watching"


@dataclass(frozen=True)
class Train:
    """A candidate is to be trained from the active version."""


@dataclass(frozen=True)
class LetLookOn:
    """A version is to be the shadow."""

    version: str
    why: str
    numbers: tuple[VersionMetric, ...] = ()


@dataclass(frozen=True)
class Promote:
    """The candidate is to become active, in place of `former`, which becomes the shadow."""

    version: str
    former: str
    why: str
    numbers: tuple[VersionMetric, ...]


@dataclass(frozen=True)
class TakeBack:
    """The version before is to be active again, in place of `version`."""

    version: str
    why: str
    numbers: tuple[VersionMetric, ...]


@dataclass(frozen=True)
class LookAway:
    """The shadow is to be cleared."""

    version: str
    why: str
    numbers: tuple[VersionMetric, ...] = ()


Decision: TypeAlias = Train | LetLookOn | Promote | TakeBack | LookAway


@dataclass
class _Trial:
    """A pair of versions under judgement: whether the shadow is better than the active one."""

    active: str
    shadow: str
    judge: Judge
    stretches: Stretches

    def numbers(self) -> tuple[VersionMetric, ...]:
        """What a decision is made on."""
        judge = self.judge
        return (
            VersionMetric("gain", judge.mean),
            VersionMetric("stretches", float(judge.num_seen)),
            VersionMetric("evidence", judge.evidence),
            VersionMetric("evidence_needed", 1 / judge.settings.alpha),
        )


class Course:
    """One service's learning; told and asked from one thread.

    Args:
        config: thresholds.

    Attributes:
        state: see LearnerState.
    """

    def __init__(self, config: LearnerConfig) -> None:
        self.state = LearnerState.GATHERING
        self._config = config
        self._is_asked = False
        self._trained_at_tokens = 0
        self._trial: _Trial | None = None

    @property
    def progress(self) -> tuple[VersionMetric, ...]:
        """Of the judgement that is open."""
        return () if self._trial is None else self._trial.numbers()

    def ask(self) -> bool:
        """Somebody wants a candidate trained as soon as it can be; False while one is trained or tried."""
        if self.state is not LearnerState.GATHERING:
            return False
        self._is_asked = True
        return True

    def gathered(self, num_documents: int, total_tokens: int) -> Sequence[Decision]:
        """So many documents are there, and so many tokens were seen since the start."""
        if self.state is not LearnerState.GATHERING:
            return ()
        config = self._config
        is_new = total_tokens - self._trained_at_tokens >= config.train_after_tokens
        if not self._is_asked and not (is_new and num_documents >= config.train_after_documents):
            return ()
        self.state, self._is_asked = LearnerState.TRAINING, False
        self._trained_at_tokens = total_tokens
        return (Train(),)

    def trained(self, version: str, active: str, metrics: Sequence[VersionMetric]) -> Sequence[Decision]:
        """The candidate is published; the active version is what it was trained from."""
        if self.state is not LearnerState.TRAINING:
            return ()
        self._begin_trial(LearnerState.SHADOWING, active, version, Judge(self._config.promotion))
        return (LetLookOn(version, f"It was trained from {active} on what was served.", tuple(metrics)),)

    def failed(self) -> None:
        """There is no candidate, or what was decided could not be carried out: it begins anew, with new text."""
        self.state, self._trial = LearnerState.GATHERING, None

    def compared(self, comparison: StepComparison) -> Sequence[Decision]:
        """Both versions were scored in a step."""
        trial = self._trial
        if trial is None or comparison.shadow_version != trial.shadow or comparison.active_version != trial.active:
            return ()
        gain = trial.stretches.add(comparison)
        if gain is None:
            return ()
        verdict = trial.judge.see(gain)
        if verdict is Verdict.OPEN:
            return ()
        return (
            self._promotion(trial, verdict) if self.state is LearnerState.SHADOWING else self._relapse(trial, verdict)
        )

    def changed(self, active: str, shadow: str | None) -> Sequence[Decision]:
        """These versions are active and looking on; somebody else may have made them so, and then it is theirs."""
        trial = self._trial
        if trial is None or (active == trial.active and shadow == trial.shadow):
            return ()
        self.failed()
        if shadow != trial.shadow:
            return ()
        return (LookAway(trial.shadow, f"Somebody activated {active} meanwhile.", trial.numbers()),)

    def _promotion(self, trial: _Trial, verdict: Verdict) -> Sequence[Decision]:
        numbers = trial.numbers()
        if verdict is Verdict.BETTER:
            self._begin_trial(LearnerState.WATCHING, trial.shadow, trial.active, Judge(self._config.relapse))
            why = f"Its recall was {trial.judge.mean:+.4f} better over {trial.judge.num_seen} stretches."
            return (Promote(trial.shadow, trial.active, why, numbers),)
        self.failed()
        return (LookAway(trial.shadow, "It was not shown to be better.", numbers),)

    def _relapse(self, trial: _Trial, verdict: Verdict) -> Sequence[Decision]:
        numbers = trial.numbers()
        self.failed()
        if verdict is Verdict.BETTER:
            why = f"{trial.shadow} was {trial.judge.mean:+.4f} better over {trial.judge.num_seen} stretches after it."
            return (TakeBack(trial.active, why, numbers), LookAway(trial.shadow, "It is active again.", numbers))
        return (LookAway(trial.shadow, f"{trial.active} has proved itself.", numbers),)

    def _begin_trial(self, state: LearnerState, active: str, shadow: str, judge: Judge) -> None:
        self.state = state
        self._trial = _Trial(active, shadow, judge, Stretches(self._config.stretch))
