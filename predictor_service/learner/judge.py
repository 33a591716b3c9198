"""Whether a candidate is better: a sequential test that may be looked at after every document, with a stated error.

A document's difference d is the candidate's mean recall less the active version's, cut to [-c, c]. Against "the mean
difference is at most m" it is bet with a share f of the wealth on d > m:

    wealth  <-  wealth * (1 + f (d - m) / (c + m))

If the claim is true no bet gains on average, so by Ville's inequality the wealth ever reaches 1/alpha with a
probability of at most alpha, however long and however often one looks; nothing is assumed of how differences are
distributed, only that each document's is fair given those before. Several f are bet at once, with an equal part of the
wealth each (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2023).
Shapes: N documents, F shares.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

SHARES: Final = (0.06, 0.12, 0.25, 0.5, 0.95)
"""f: small ones win where differences scatter much, large ones where they are all alike."""

_LARGEST_LOG: Final = 700.0
_BISECTIONS: Final = 40


class Verdict(Enum):
    """What is known of a gain. Once it is not OPEN it stays what it is."""

    OPEN = "open"
    BETTER = "better"
    """Above `min_gain`."""
    NOT_BETTER = "not_better"
    """Not above it."""
    UNDECIDED = "undecided"
    """There were as many documents as there may be."""


@dataclass(frozen=True)
class JudgeSettings:
    """See LearnerConfig, whose names these are, but for `max_documents`, which is after how many it is UNDECIDED."""

    min_gain: float
    alpha: float
    give_up_alpha: float
    largest_difference: float
    max_documents: int


@dataclass(frozen=True)
class Judgement:
    """What is known after some documents.

    Attributes:
        verdict: see Verdict.
        documents: that were compared.
        gain: their mean difference in recall.
        e_value: the wealth against "the gain is at most `min_gain`".
        give_up_e_value: the wealth against "it is at least that".
        gain_at_least: the gain is above it, with an error of alpha at any time.
    """

    verdict: Verdict
    documents: int
    gain: float
    e_value: float
    give_up_e_value: float
    gain_at_least: float

    def numbers(self) -> dict[str, float]:
        """For the history."""
        return {
            "documents": float(self.documents),
            "gain": self.gain,
            "gain_at_least": self.gain_at_least,
            "e_value": self.e_value,
            "give_up_e_value": self.give_up_e_value,
        }


def log_growth(difference_N: Float64Array, mean: float, largest: float) -> Float64Array:
    """(N, F): by how much a bet on more than `mean` grows the wealth, as a logarithm."""
    gain_N1 = ((difference_N - mean) / (largest + mean))[:, None]
    growth_NF: Float64Array = np.log1p(np.array(SHARES) * gain_N1)
    return growth_NF


def log_wealth(growth_NF: Float64Array) -> Float64Array:
    """(N,): of all shares together after each document."""
    total_NF = np.cumsum(growth_NF, axis=0)
    largest_N1 = total_NF.max(axis=1, keepdims=True)
    wealth_N: Float64Array = np.log(np.exp(total_NF - largest_N1).mean(axis=1)) + largest_N1[:, 0]
    return wealth_N


class Judge:
    """Compares one candidate with one active version.

    Args:
        settings: see JudgeSettings.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._differences: list[float] = []
        self._verdict = Verdict.OPEN

    @property
    def verdict(self) -> Verdict:
        """As of now."""
        return self._verdict

    def add(self, difference: float) -> Verdict:
        """Takes one more document's difference in, within [-1, 1]; ignored once there is a verdict."""
        assert -1 <= difference <= 1, "recalls are shares"
        if self._verdict is Verdict.OPEN:
            largest = self._settings.largest_difference
            self._differences.append(min(max(difference, -largest), largest))
            self._verdict = self._decide()
        return self._verdict

    def judgement(self) -> Judgement:
        """With its numbers."""
        differences = self._differences
        return Judgement(
            verdict=self._verdict,
            documents=len(differences),
            gain=sum(differences) / len(differences) if differences else 0.0,
            e_value=_exp(self._log_wealth(self._settings.min_gain)),
            give_up_e_value=_exp(self._log_give_up_wealth()),
            gain_at_least=self._gain_at_least(),
        )

    def _decide(self) -> Verdict:
        settings = self._settings
        if self._log_wealth(settings.min_gain) >= -math.log(settings.alpha):
            return Verdict.BETTER
        if self._log_give_up_wealth() >= -math.log(settings.give_up_alpha):
            return Verdict.NOT_BETTER
        return Verdict.UNDECIDED if len(self._differences) >= settings.max_documents else Verdict.OPEN

    def _log_wealth(self, mean: float) -> float:
        if not self._differences:
            return 0.0
        growth_NF = log_growth(np.array(self._differences), mean, self._settings.largest_difference)
        return float(log_wealth(growth_NF)[-1])

    def _log_give_up_wealth(self) -> float:
        """The same bet on the other side: -d is above -m."""
        if not self._differences:
            return 0.0
        settings = self._settings
        growth_NF = log_growth(-np.array(self._differences), -settings.min_gain, settings.largest_difference)
        return float(log_wealth(growth_NF)[-1])

    def _gain_at_least(self) -> float:
        """The largest mean that the wealth speaks against; the wealth falls as the mean rises."""
        largest = self._settings.largest_difference
        low, high = -largest, largest
        if not self._differences:
            return low
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._log_wealth(middle) >= -math.log(self._settings.alpha):
                low = middle
            else:
                high = middle
        return low


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, _LARGEST_LOG))
