"""Whether a version is better than another: a sequential test that may be looked at after every document.

A bettor stakes a part of its wealth on the next difference being above a bound. If the bound were true, the wealth
would be a supermartingale: by Ville's inequality it ever exceeds 1/α with a probability of α at most, however often it
is looked at and whenever one stops (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
2020; the stake is their aGRAPA). Two bettors bet here: that the gain is above the least one that is wanted, and that it
is below.

Differences are cut off at ±`largest` first, so that one odd document decides nothing and a steady small gain is seen
early: what is tested is the mean of the differences so cut. Knows no versions and no processes.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

_MOST_STAKED: Final = 0.9
"""Of the wealth, when the next difference is the worst there can be."""

_PRIOR: Final = 1.0
"""Imagined differences at the bound, so that the first real ones are not taken for the rule."""


class Verdict(Enum):
    """`open`: go on. `better`: the gain is above the bound. `not_better`: it is below, or was not shown in time."""

    OPEN = "open"
    BETTER = "better"
    NOT_BETTER = "not_better"


@dataclass(frozen=True)
class JudgeSettings:
    """What is asked of a difference.

    Attributes:
        least_gain: that counts as better.
        alpha: the probability that what is not better is called so, at most.
        largest: differences beyond it count as it.
        most_stretches: without a verdict after so many, it is not better.
    """

    least_gain: float
    alpha: float
    largest: float
    most_stretches: int

    def __post_init__(self) -> None:
        assert 0.0 < self.largest <= 1.0, "scores are shares"
        assert abs(self.least_gain) < self.largest, "a gain that nothing could show"
        assert 0.0 < self.alpha < 1.0, "a probability"
        assert self.most_stretches > 0, "one look at least"


class Judge:
    """Sees one difference after the other.

    Args:
        settings: see JudgeSettings.

    Attributes:
        num_seen: differences so far.
        mean: of them, as they are.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.num_seen = 0
        self.mean = 0.0
        bound = settings.least_gain / settings.largest
        self._above = _Bettor(bound)
        self._below = _Bettor(-bound)

    @property
    def evidence(self) -> float:
        """The wealth that was won on a gain above the bound; 1/α is enough."""
        return self._above.wealth

    @property
    def verdict(self) -> Verdict:
        """As it is now; once it is not open, nothing changes it."""
        enough = 1 / self.settings.alpha
        if self._above.peak >= enough:
            return Verdict.BETTER
        if self._below.peak >= enough or self.num_seen >= self.settings.most_stretches:
            return Verdict.NOT_BETTER
        return Verdict.OPEN

    def see(self, difference: float) -> Verdict:
        """Takes one difference, from -1 to 1; none after the verdict."""
        if self.verdict is not Verdict.OPEN:
            return self.verdict
        self.num_seen += 1
        self.mean += (difference - self.mean) / self.num_seen
        largest = self.settings.largest
        unit = max(-largest, min(largest, difference)) / largest
        self._above.see(unit)
        self._below.see(-unit)
        return self.verdict


class _Bettor:
    """Bets that the mean of numbers from -1 to 1 is above a bound."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._count = _PRIOR
        self._mean = bound
        # Of numbers from -1 to 1 the variance is 1 at most.
        self._squares = _PRIOR
        self.wealth = 1.0
        self.peak = 1.0

    def see(self, number: float) -> None:
        """The stake was chosen before the number was seen: that is what makes it a fair bet."""
        self.wealth *= 1.0 + self._stake() * (number - self._bound)
        self.peak = max(self.peak, self.wealth)
        self._count += 1
        before = number - self._mean
        self._mean += before / self._count
        self._squares += before * (number - self._mean)

    def _stake(self) -> float:
        edge = self._mean - self._bound
        if edge <= 0.0:
            return 0.0
        variance = self._squares / self._count
        return min(edge / (variance + edge * edge), _MOST_STAKED / (1.0 + self._bound))
