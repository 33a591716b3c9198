"""What a learner can be asked for; defaults live here and nowhere else."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MOST_COUNT: Final = 1 << 30
NICEST: Final = 19


@dataclass(frozen=True)
class LearnerConfig:
    """The `[learner]` table.

    A document is one request. Hidden states may reveal its text: they stay in memory unless `keep_on_disk` is given.

    Attributes:
        enabled: learn from what is served.
        max_nbytes: of hidden states and routings that are held in memory; while a candidate is trained, documents that
            it is trained on stay until it is done, so that it may be twice as much.
        max_document_tokens: of one document that are held; its first ones.
        half_life_s: after so long a document is half as likely to be held as a new one.
        keep_on_disk: folder where finished documents are kept over restarts; None: they never leave the memory.
        disk_max_nbytes, disk_max_age_s: what is kept there at most, and for how long. A learner removes the rest while
            it runs; what one leaves behind that is switched off is removed by hand.
        held_out_share: of the documents, which are measured on and never trained on.
        min_documents: that are held before a first training.
        documents_between_trainings: that are new before the next one.
        max_steps, max_train_s: of the optimiser and of processor time, of one training.
        learning_rate: of one that begins from the active version.
        cpu_share: of one core that a training has, while nodes have shown no layer for a second.
        serving_cpu_share: the same while they do, so that `max_train_s` may take hours. Where no core is idle, a
            training chills the caches that predicting works with: hints come later by its share of the time
            (`make bench-learner`). A node that asks its predictor nothing shows nothing: that counts as idle.
        niceness: of the learner's process; with 19 what trains is in the scheduler's idle class, too: it has what
            nobody else wants, and gives the processor back at once.
        alpha: how often at most a candidate is promoted whose gain is not above `min_gain`.
        give_up_alpha: how often at most one is given up that is better by more than `min_gain`.
        min_gain: in recall, from where on a candidate is worth a promotion.
        largest_difference: of the recalls of one document; more is counted as so much. The smaller it is, the fewer
            documents a decision needs; documents' differences scatter by 0.02 (of 40 tokens; longer ones less).
        max_documents: after which a candidate that is not decided on is given up.
        watch_documents: after a promotion, that the former version is compared on.
        tolerated_loss: in recall; when the former version is shown to be better by more, it is rolled back to.
        max_document_steps: of one document that are compared.
    """

    enabled: bool = False
    max_nbytes: int = 256 << 20
    max_document_tokens: int = 512
    half_life_s: float = 3600.0
    keep_on_disk: Path | None = None
    disk_max_nbytes: int = 1 << 30
    disk_max_age_s: float = 7 * 86400.0
    held_out_share: float = 0.2
    min_documents: int = 64
    documents_between_trainings: int = 64
    max_steps: int = 2000
    max_train_s: float = 600.0
    learning_rate: float = 2e-3
    cpu_share: float = 0.5
    serving_cpu_share: float = 0.05
    niceness: int = 19
    alpha: float = 0.01
    give_up_alpha: float = 0.1
    min_gain: float = 0.005
    largest_difference: float = 0.1
    max_documents: int = 400
    watch_documents: int = 200
    tolerated_loss: float = 0.0
    max_document_steps: int = 256

    def __post_init__(self) -> None:
        for name in ("max_nbytes", "max_document_tokens", "disk_max_nbytes", "min_documents", "max_steps"):
            self._check_count(name, getattr(self, name))
        for name in ("documents_between_trainings", "max_documents", "watch_documents", "max_document_steps"):
            self._check_count(name, getattr(self, name))
        for name in ("half_life_s", "disk_max_age_s", "max_train_s", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"learner.{name} is {getattr(self, name)}; allowed: above 0")
        for name in ("held_out_share", "alpha", "give_up_alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"learner.{name} is {getattr(self, name)}; allowed: between 0 and 1")
        for name in ("cpu_share", "serving_cpu_share", "largest_difference"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"learner.{name} is {getattr(self, name)}; allowed: above 0, up to 1")
        if not 0 <= self.niceness <= NICEST:
            raise ValueError(f"learner.niceness is {self.niceness}; allowed: 0 to {NICEST}")
        for name in ("min_gain", "tolerated_loss"):
            if not 0 <= getattr(self, name) < self.largest_difference:
                raise ValueError(
                    f"learner.{name} is {getattr(self, name)}; allowed: 0 to below learner.largest_difference, "
                    f"{self.largest_difference}"
                )

    def _check_count(self, name: str, value: int) -> None:
        most = 1 << 50 if name.endswith("nbytes") else _MOST_COUNT
        if not 1 <= value <= most:
            raise ValueError(f"learner.{name} is {value}; allowed: 1 to {most}")
