"""What a trace says of the link and of the hints: loads by reason, and how good each version's hints were."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent


@dataclass
class LoadTotals:
    """Loads that were queued for one reason. `paused_nbytes` came, but not (yet) the whole expert."""

    loads: int = 0
    nbytes: int = 0
    paused_nbytes: int = 0
    link_s: float = 0.0


@dataclass
class HintTotals:
    """One version's hints at one lookahead in one phase, as far as they were taken.

    Attributes:
        hints: whose layer was computed.
        hinted: experts in their heads, `num_expected` of each.
        correct: those of `hinted` that were routed.
        routed: experts that the layers needed.
        found: of them, how many were in the hints' heads or behind them, at most half as many again.
        latencies_s: from the observation to the notice, where known.
    """

    hints: int = 0
    hinted: int = 0
    correct: int = 0
    routed: int = 0
    found: int = 0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """Share of the hinted experts that were routed."""
        return self.correct / self.hinted if self.hinted else None

    @property
    def recall(self) -> float | None:
        """Share of the routed experts that were hinted, half as many again as expected."""
        return self.found / self.routed if self.routed else None

    def latency_s(self, percentile: float) -> float | None:
        """Of the hints whose latency is known."""
        return float(np.percentile(self.latencies_s, percentile)) if self.latencies_s else None


@dataclass(frozen=True)
class HintGroup:
    """What hints are put together by."""

    version: str
    lookahead: int
    is_prefill: bool


class TrafficCollector:
    """Takes a trace's events in order.

    Attributes:
        loads: by reason.
        fates: of all hints.
        hints: of those that were taken.
    """

    def __init__(self, num_layers: int) -> None:
        self.loads: defaultdict[LoadReason, LoadTotals] = defaultdict(LoadTotals)
        self.fates = Counter[HintFate]()
        self.hints: defaultdict[HintGroup, HintTotals] = defaultdict(HintTotals)
        self._num_layers = num_layers
        self._is_prefill = False
        self._open: dict[tuple[int, int], list[HintEvent]] = {}

    def add_all(self, events: Iterable[TraceEvent]) -> None:
        """The next events."""
        for event in events:
            if isinstance(event, LoadEvent):
                self._add_load(event)
            elif isinstance(event, HintEvent):
                self.fates[event.fate] += 1
                if event.fate is HintFate.TAKEN:
                    self._open.setdefault((event.hint.step, event.hint.layer), []).append(event)
            elif isinstance(event, StepEvent):
                self._is_prefill = any(span.is_prefill for span in event.spans)
                self._open = {place: hints for place, hints in self._open.items() if place[0] >= event.step}
            else:
                self._judge(event)

    def _add_load(self, event: LoadEvent) -> None:
        totals = self.loads[event.reason]
        if event.is_paused:
            totals.paused_nbytes += event.nbytes
            return
        totals.loads += 1
        totals.nbytes += event.nbytes
        totals.link_s += event.end_s - event.begin_s

    def _judge(self, event: LayerEvent) -> None:
        routed = set(event.hits + event.misses)
        for hint_event in self._open.pop((event.step, event.layer), []):
            hint = hint_event.hint
            lookahead = hint.layer - hint.observed_layer + self._num_layers * (hint.step - hint.observed_step)
            totals = self.hints[HintGroup(hint.version, lookahead, self._is_prefill)]
            experts = hint.experts.tolist()
            head = experts[: hint.num_expected]
            totals.hints += 1
            totals.hinted += len(head)
            totals.correct += len(routed.intersection(head))
            totals.routed += len(routed)
            totals.found += len(routed.intersection(experts[: hint.num_expected + hint.num_expected // 2]))
            if hint_event.latency_s is not None:
                totals.latencies_s.append(hint_event.latency_s)
