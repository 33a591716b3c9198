"""Puts steps together to what is judged: scores of one request's steps are too much alike to count one by one."""

from dataclasses import dataclass, field

from predictor_service.shadow.tally import StepComparison


@dataclass(frozen=True)
class StretchSettings:
    """How long a stretch is.

    Attributes:
        least_steps: that it has.
        most_steps: after which it ends, though the requests it began with go on.
    """

    least_steps: int
    most_steps: int

    def __post_init__(self) -> None:
        assert 0 < self.least_steps <= self.most_steps, "the least is at most the most"


@dataclass
class Stretches:
    """Of one pair of versions: a stretch ends when none of the requests that it began with are left in a step.

    So each request of a quiet node is one, but for very short ones; on a busy node it is as long as the longest of its
    first requests.
    """

    settings: StretchSettings
    _first: frozenset[str] = field(default=frozenset(), init=False)
    _steps: int = field(default=0, init=False)
    _sum: float = field(default=0.0, init=False)

    def add(self, comparison: StepComparison) -> float | None:
        """Takes a step; the mean gain of the stretch that ended before it, if one did."""
        ended: float | None = None
        settings = self.settings
        is_long = self._steps >= settings.least_steps
        if self._steps >= settings.most_steps or (is_long and self._first.isdisjoint(comparison.request_ids)):
            ended = self._sum / self._steps
            self._steps, self._sum = 0, 0.0
        if not self._steps:
            self._first = frozenset(comparison.request_ids)
        self._steps += 1
        self._sum += comparison.shadow_score - comparison.active_score
        return ended
