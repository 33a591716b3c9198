"""The newest hint for the next visit of each MoE layer. Owned by the engine thread."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from promoe.hint import Hint
from promoe.trace_events import HintFate


@dataclass(frozen=True)
class ComingVisit:
    """A layer that will be visited, and what is hinted for it.

    Attributes:
        distance: counts layers from now, from 1 up.
        experts, scores: of the hint, as lists, best first.
        num_expected: how many of them the layer will probably need.
    """

    layer: int
    distance: int
    experts: list[int]
    scores: list[float]
    num_expected: int


@dataclass(frozen=True)
class _Filed:
    """A hint, and its lists, which are looked at in every look around."""

    hint: Hint
    experts: list[int]
    scores: list[float]


def _share_a_step(one: Hint, other: Hint) -> bool:
    """Made of the same observation by two versions: each for its own requests of the step."""
    same_observation = one.observed_step == other.observed_step and one.observed_layer == other.observed_layer
    return one.step == other.step and same_observation and one.version != other.version


def _union(filed: _Filed, hint: Hint) -> Hint:
    """What either's requests will need. Scores are joined as independent probabilities, others by the larger one."""
    score_of = dict(zip(filed.experts, filed.scores, strict=True))
    others: list[float] = hint.scores.tolist()
    for expert, score in zip(hint.experts.tolist(), others, strict=True):
        before = score_of.get(expert, 0.0)
        are_probabilities = 0.0 <= before <= 1.0 and 0.0 <= score <= 1.0
        score_of[expert] = before + score - before * score if are_probabilities else max(before, score)
    experts = sorted(score_of, key=lambda expert: -score_of[expert])
    return Hint(
        step=hint.step,
        layer=hint.layer,
        observed_step=hint.observed_step,
        observed_layer=hint.observed_layer,
        experts=np.array(experts, np.uint16),
        scores=np.array([score_of[expert] for expert in experts], np.float32),
        num_expected=min(filed.hint.num_expected + hint.num_expected, len(experts)),
        version=hint.version,
    )


class HintBook:
    """Files hints by layer; a newer one for the same visit replaces the older, which was made from further away. Two of
    the same observation are of an active version and its canary, each for its own requests, and are joined.

    Attributes:
        step: the running step; 0 before the first.
        layer: whose routing became known last in it; -1 at its beginning.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._filed: list[_Filed | None] = [None] * num_layers
        self.step = 0
        self.layer = -1

    def begin_step(self, step: int) -> Iterator[Hint]:
        """Forgets hints for steps that are over; yields those that came early for this one."""
        self.step, self.layer = step, -1
        for layer, filed in enumerate(self._filed):
            if filed is not None and filed.hint.step != step:
                self._filed[layer] = None
            elif filed is not None:
                yield filed.hint

    def file(self, hint: Hint) -> HintFate:
        """Takes a hint for a visit that is still to come."""
        if hint.step < self.step or (hint.step == self.step and hint.layer <= self.layer):
            return HintFate.LATE
        if hint.step > self.step + 1 or (hint.step > self.step and hint.layer > self.layer):
            # Not for the layer's next visit, but for one after it.
            return HintFate.INVALID
        filed = self._filed[hint.layer]
        if filed is not None and _share_a_step(filed.hint, hint):
            hint = _union(filed, hint)
        self._filed[hint.layer] = _Filed(hint, hint.experts.tolist(), hint.scores.tolist())
        return HintFate.TAKEN

    def routed(self, layer: int) -> None:
        """The layer's visit is over; a hint for the next step is kept."""
        self.layer = layer
        filed = self._filed[layer]
        if filed is not None and filed.hint.step <= self.step:
            self._filed[layer] = None

    def hint_for(self, layer: int) -> Hint | None:
        """The hint for the layer's next visit."""
        filed = self._filed[layer]
        return None if filed is None else filed.hint

    def coming(self, max_distance: int) -> Iterator[ComingVisit]:
        """Hinted visits in the order they will happen, up to so many layers from now."""
        for distance in range(1, min(max_distance, self._num_layers) + 1):
            layer = (self.layer + distance) % self._num_layers
            filed = self._filed[layer]
            # Beyond the last layer only what is for the next step is meant, before it only what is for this one.
            if filed is not None and filed.hint.step == self.step + (self.layer + distance) // self._num_layers:
                yield ComingVisit(layer, distance, filed.experts, filed.scores, filed.hint.num_expected)
