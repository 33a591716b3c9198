"""What a node did lately: its counters now against those of a few seconds ago."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from promoe.cache_map import CacheMap
from promoe.node_report import CacheStats, NodeInfo, StepPhase

WINDOW_S: Final = 10.0

Counter: TypeAlias = Callable[[CacheStats], float]
"""Reads a number that only grows while the node lives."""


@dataclass(frozen=True)
class NodeSample:
    """One look at a node. `at_s`: by `time.perf_counter`."""

    at_s: float
    info: NodeInfo
    stats: CacheStats
    cache_map: CacheMap


@dataclass(frozen=True)
class HintTotals:
    """How good hints were, summed over layers; counts are over experts, as in HintQuality."""

    hinted: int = 0
    correct: int = 0
    ready: int = 0

    def __add__(self, other: "HintTotals") -> "HintTotals":
        return HintTotals(self.hinted + other.hinted, self.correct + other.correct, self.ready + other.ready)

    def __sub__(self, other: "HintTotals") -> "HintTotals":
        return HintTotals(self.hinted - other.hinted, self.correct - other.correct, self.ready - other.ready)

    @property
    def accuracy(self) -> float | None:
        """Share of hinted experts that were routed; None without hints."""
        return self.correct / self.hinted if self.hinted else None

    @property
    def fetch_rate(self) -> float | None:
        """Share of hinted experts that were READY when the routing became known; None without hints."""
        return self.ready / self.hinted if self.hinted else None

    @property
    def good_pred(self) -> float | None:
        """Accuracy times fetch rate (ProMoE §4.1)."""
        accuracy, fetch_rate = self.accuracy, self.fetch_rate
        return None if accuracy is None or fetch_rate is None else accuracy * fetch_rate


def hint_totals(stats: CacheStats, version: str | None = None) -> dict[int, HintTotals]:
    """By lookahead, for decode steps, of one version or of all."""
    totals: dict[int, HintTotals] = {}
    for quality in stats.hints.qualities:
        if quality.phase is StepPhase.DECODE and version in (None, quality.version):
            before = totals.get(quality.lookahead, HintTotals())
            totals[quality.lookahead] = before + HintTotals(quality.hinted, quality.correct, quality.ready)
    return dict(sorted(totals.items()))


@dataclass(frozen=True)
class Window:
    """Between two looks at the same node; without a first one, since the node's start.

    Attributes:
        since: the first look; None for the node's start.
        now: the second.
        elapsed_s: between the two; 0 where that is not known.
    """

    since: CacheStats | None
    now: CacheStats
    elapsed_s: float

    def delta(self, counter: Counter) -> float:
        """How much the counter grew."""
        return counter(self.now) - (counter(self.since) if self.since is not None else 0)

    def per_s(self, counter: Counter) -> float | None:
        """How much it grew each second; None where no time passed."""
        return self.delta(counter) / self.elapsed_s if self.elapsed_s > 0 else None

    def share(self, part: Counter, whole: Counter) -> float | None:
        """Of the growth of `whole`, what `part` grew by; None where it did not grow."""
        whole_delta = self.delta(whole)
        return self.delta(part) / whole_delta if whole_delta else None

    def hints(self, version: str | None) -> dict[int, HintTotals]:
        """By lookahead; see hint_totals."""
        before = hint_totals(self.since, version) if self.since is not None else {}
        now = hint_totals(self.now, version)
        return {lookahead: totals - before.get(lookahead, HintTotals()) for lookahead, totals in now.items()}


class NodeHistory:
    """The looks of the last seconds; forgets them when another process answers."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._samples: deque[NodeSample] = deque()

    def add(self, sample: NodeSample) -> None:
        """Later than those before. The oldest that is kept is as old as the window, or a little older."""
        samples = self._samples
        if samples and samples[-1].info.service.instance_id != sample.info.service.instance_id:
            samples.clear()
        samples.append(sample)
        while len(samples) > 2 and sample.at_s - samples[1].at_s >= self._window_s:
            samples.popleft()

    @property
    def last(self) -> NodeSample | None:
        """The last look."""
        return self._samples[-1] if self._samples else None

    def lately(self) -> Window | None:
        """The last seconds; None before the second look."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        return Window(first.stats, last.stats, last.at_s - first.at_s)

    def since_start(self) -> Window | None:
        """Since the node's start; None before the first look."""
        return Window(None, self._samples[-1].stats, 0.0) if self._samples else None
