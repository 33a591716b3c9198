"""What the learner may do and use; defaults live here and nowhere else."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from predictor_service.learner.judge import JudgeSettings
from predictor_service.learner.stretch import StretchSettings

_COUNTS: Final = (
    "train_after_tokens",
    "train_after_documents",
    "max_memory_bytes",
    "max_tokens_per_document",
    "least_steps",
    "most_steps",
    "max_stretches",
    "watch_stretches",
    "keep_versions",
    "keep_bytes",
)
_DURATIONS: Final = ("max_train_s", "half_life_s", "keep_s")
_SHARES: Final = ("held_out_share", "error_rate", "largest_gain")


@dataclass(frozen=True)
class LearnerConfig:
    """The `[learner]` table.

    Attributes:
        enabled: whether the service learns from what it serves. Hidden states may reveal text: see `keep_folder`.
        train_after_tokens: decoded tokens that are new since the last training, before another one begins.
        train_after_documents: requests that must have been gathered.
        max_train_s: for how long a candidate is trained.
        max_memory_bytes: of what is gathered.
        half_life_s: half of what is gathered is younger, on a steadily busy service.
        max_tokens_per_document: of one request.
        held_out_share: of the requests, which candidates are measured on and never trained on.
        least_gain: of recall, that a candidate must have over the active version to take its place.
        error_rate: the probability that one is promoted that has not; and that a promotion is taken back though the
            version before was not better.
        largest_gain: of one stretch of steps; what is beyond counts as it.
        least_steps, most_steps: of a stretch: requests shorter than the least are judged together, and a longer one is
            judged more than once.
        max_stretches: without a verdict after so many, a candidate is given up.
        watch_stretches: for so long the version before is compared with a promoted one.
        keep_versions: of those that were learned, the newest so many stay published.
        keep_folder: where what is gathered is kept over a restart; None: in memory only. Whoever reads the folder can
            learn something of what was said.
        keep_bytes, keep_s: of that folder: the most, and the longest.
    """

    enabled: bool = False
    train_after_tokens: int = 4096
    train_after_documents: int = 24
    max_train_s: float = 120.0
    max_memory_bytes: int = 256 << 20
    half_life_s: float = 3600.0
    max_tokens_per_document: int = 2048
    held_out_share: float = 0.2
    least_gain: float = 0.002
    error_rate: float = 0.01
    largest_gain: float = 0.1
    least_steps: int = 16
    most_steps: int = 256
    max_stretches: int = 400
    watch_stretches: int = 100
    keep_versions: int = 8
    keep_folder: Path | None = None
    keep_bytes: int = 1 << 30
    keep_s: float = 7 * 86400.0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"learner.{name} is {value}; allowed: 1 or more")
        for name in _DURATIONS:
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ValueError(f"learner.{name} is {value}; allowed: more than 0")
        for name in _SHARES:
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ValueError(f"learner.{name} is {value}; allowed: more than 0 and less than 1")
        if not 0.0 <= self.least_gain < self.largest_gain:
            raise ValueError(
                f"learner.least_gain is {self.least_gain}; allowed: 0 or more, and less than largest_gain "
                f"({self.largest_gain})"
            )
        if self.least_steps > self.most_steps:
            raise ValueError(
                f"learner.least_steps is {self.least_steps}; allowed: at most most_steps ({self.most_steps})"
            )

    @property
    def stretch(self) -> StretchSettings:
        """How steps are put together."""
        return StretchSettings(self.least_steps, self.most_steps)

    @property
    def promotion(self) -> JudgeSettings:
        """What a candidate must show."""
        return JudgeSettings(self.least_gain, self.error_rate, self.largest_gain, self.max_stretches)

    @property
    def relapse(self) -> JudgeSettings:
        """What the version before must show, for a promotion to be taken back."""
        return JudgeSettings(0.0, self.error_rate, self.largest_gain, self.watch_stretches)
