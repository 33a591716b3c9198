"""How good hints are: scored against the routing when it becomes known, by version, layer, lookahead and phase.

A sink of trace events on the engine thread; the event loop asks for the scores. A step with any prompt token counts as
prefill: its routing is the union over prompt and decode tokens.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

from compute_node.place_odds import OddsKey, PlaceOdds
from compute_node.step_ledger import Phase
from promoe.hint import Hint
from promoe.trace_events import HintEvent, HintFate, LayerEvent, StepEvent, TraceEvent

BOUNDS_S: Final[tuple[float, ...]] = (
    50e-6, 100e-6, 200e-6, 500e-6, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0,
)  # fmt: skip

MAX_VERSIONS: Final = 8
"""Scores of older versions are forgotten: versions come from outside, and there is no end to them."""


class ScoreKey(NamedTuple):
    """What is scored apart. `lookahead`: MoE layers from the observed one to the hinted one."""

    version: str
    layer: int
    lookahead: int
    phase: Phase


@dataclass
class HintScore:
    """Counts over experts; see `HintQuality` in inference.proto.

    Attributes:
        hints: layers of steps with a hint.
        hinted: experts in the heads of the hints (`num_expected` of each).
        correct: those of `hinted` that were routed.
        ready: those of `hinted` that were READY when the routing became known.
        routed: experts that were routed.
        found_at: by place in the list: how often the expert there was routed.
    """

    hints: int = 0
    hinted: int = 0
    correct: int = 0
    ready: int = 0
    routed: int = 0
    found_at: list[int] = field(default_factory=list)

    @property
    def found(self) -> tuple[int, ...]:
        """By n: routed experts among the first n + 1 of the list."""
        return tuple(accumulate(self.found_at))


class DurationCounts:
    """A histogram of durations. One thread adds, any may read.

    Args:
        bounds_s: upper bounds of the buckets, ascending; the last bucket has none.
    """

    def __init__(self, bounds_s: Sequence[float] = BOUNDS_S) -> None:
        self.bounds_s = tuple(bounds_s)
        self.counts = [0] * (len(self.bounds_s) + 1)

    def add(self, duration_s: float) -> None:
        """Counts one; a duration equal to a bound is in that bound's bucket."""
        self.counts[bisect_left(self.bounds_s, duration_s)] += 1


class HintScores:
    """Scores every hint that the expert cache took, the newest of each version and lookahead.

    Args:
        num_layers: MoE layers.

    Attributes:
        fates: hints by what became of them when the cache took notice.
        latency_s: observation handed over to hint received; over packets that is when a look around finds it.
        time_until_use_s: hint taken notice of to its layer's routing being known.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._phase = Phase.DECODE
        self._odds = PlaceOdds()
        # By the visit of a layer: the newest hint of each version and lookahead, and when it was noticed.
        self._waiting: dict[tuple[int, int], dict[tuple[str, int], HintEvent]] = {}
        self.restart()

    def restart(self) -> None:
        """Counts from here."""
        self._scores: dict[ScoreKey, HintScore] = {}
        self._versions: dict[str, None] = {}
        self.fates: Counter[HintFate] = Counter()
        self.latency_s = DurationCounts()
        self.time_until_use_s = DurationCounts()

    def scores(self) -> list[tuple[ScoreKey, HintScore]]:
        """As they are now; from any thread."""
        return list(self._scores.items())

    def calibrated(self, hint: Hint) -> Hint:
        """With probabilities in place of scores that are an order only; on the engine thread."""
        return self._odds.calibrated(OddsKey(hint.version, hint.lookahead(self._num_layers)), hint)

    def __call__(self, event: TraceEvent) -> None:
        """On the engine thread."""
        if isinstance(event, LayerEvent):
            waiting = self._waiting.pop((event.step, event.layer), None)
            if waiting:
                self._score(event, waiting)
        elif isinstance(event, HintEvent):
            self._file(event)
        elif isinstance(event, StepEvent):
            self._begin_step(event)

    def _begin_step(self, event: StepEvent) -> None:
        self._phase = Phase.PREFILL if any(span.is_prefill for span in event.spans) else Phase.DECODE
        for visit in [visit for visit in self._waiting if visit[0] < event.step]:
            del self._waiting[visit]

    def _file(self, event: HintEvent) -> None:
        self.fates[event.fate] += 1
        if event.latency_s is not None:
            self.latency_s.add(event.latency_s)
        hint = event.hint
        if event.fate is HintFate.TAKEN:
            same_visit = self._waiting.setdefault((hint.step, hint.layer), {})
            same_visit[hint.version, hint.lookahead(self._num_layers)] = event

    def _score(self, layer: LayerEvent, waiting: dict[tuple[str, int], HintEvent]) -> None:
        routed = {*layer.hits, *layer.misses}
        for (version, lookahead), event in waiting.items():
            self.time_until_use_s.add(layer.at_s - event.at_s)
            score = self._score_of(ScoreKey(version, layer.layer, lookahead, self._phase))
            _add(score, event.hint, routed, layer.ready)
            if self._phase is Phase.DECODE:  # a prompt needs nearly everything, whatever was hinted
                self._odds.note(OddsKey(version, lookahead), event.hint, routed)

    def _score_of(self, key: ScoreKey) -> HintScore:
        score = self._scores.get(key)
        if score is None:
            self._make_room_for(key.version)
            score = self._scores[key] = HintScore()
        return score

    def _make_room_for(self, version: str) -> None:
        if version in self._versions:
            return
        if len(self._versions) == MAX_VERSIONS:
            oldest = next(iter(self._versions))
            del self._versions[oldest]
            # A new dict: the event loop may be looking at the old one.
            self._scores = {key: score for key, score in self._scores.items() if key.version != oldest}
        self._versions[version] = None


def _add(score: HintScore, hint: Hint, routed: set[int], ready: Sequence[int]) -> None:
    experts: list[int] = hint.experts.tolist()
    head = experts[: hint.num_expected]
    score.hints += 1
    score.hinted += len(head)
    score.correct += len(routed.intersection(head))
    score.ready += len(set(ready).intersection(head))
    score.routed += len(routed)
    found_at = score.found_at
    if len(found_at) < len(experts):
        found_at.extend([0] * (len(experts) - len(found_at)))
    for place, expert in enumerate(experts):
        if expert in routed:
            found_at[place] += 1
