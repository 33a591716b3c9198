"""What eviction may look at: when and how often experts were used, and how likely each is to be needed next.

Owned by the engine thread. Probabilities are per layer visit: every layer is visited once a step, in order, so the next
visit of layer l is a number of layers away that everybody can count. Numbers of all layers lie behind each other, layer
by layer, in `vec`s: compiled, a loop over one layer's experts takes less time than one operation on an array.
"""

import json
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from librt.vecs import vec
from mypy_extensions import i64

from compute_node.expert_uses import ARRAYS, ExpertUses
from promoe.ids import ExpertId

FloatArray = npt.NDArray[np.float64]

SHORT_DECAY: Final = 0.1
LONG_DECAY: Final = 0.02
LAST_USE_WEIGHT: Final = 0.1
"""Chosen on recorded chats of the demo model (DECISIONS.md): the share of tokens that routed to an expert, averaged
over about 10 and about 50 tokens in equal parts, and a tenth of weight on the last token alone."""

LEAST_PROBABILITY: Final = 1e-3
"""Nothing is certain not to be used again: it keeps the expected time until use finite."""

UNLISTED_SHARE: Final = 0.2
"""What is left of an expert's own probability when a hint for its layer does not list it."""


class ExpertHistory:
    """Uses, and estimates of the next use, of every expert.

    Attributes:
        uses: when and how often experts were used.
        layer: the layer whose routing became known last; -1 at the beginning of a step.
        version: changes whenever estimates of the next use do.
        changes: by layer, counts up whenever something is known anew of its experts.
    """

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._experts_per_token = experts_per_token
        self.version = 0
        self.changes: vec[i64] = vec[i64]([0] * num_layers)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        num, start = self.num_layers * self.num_experts, self._experts_per_token / self.num_experts
        self.uses = ExpertUses(self.num_layers, self.num_experts)
        self._short: vec[float] = vec[float]([start] * num)
        self._long: vec[float] = vec[float]([start] * num)
        # That one token needs the expert; that the layer's next visit does; how many visits later when it does not.
        self._of_token: vec[float] = vec[float]([start] * num)
        self._next: vec[float] = vec[float]([start] * num)
        self._later_visits: vec[float] = vec[float]([1 / start] * num)
        self.layer = -1
        self._num_next_rows = 1
        self._changed_everywhere()

    def begin_step(self, num_tokens: int, num_requests: int) -> None:
        """The next visits are this step's, of `num_tokens` tokens; the step after it has a token per request."""
        self.layer = -1
        self.version += 1
        if num_tokens != self._num_next_rows:
            of_token, of_step = self._of_token, self._next
            for place in range(len(of_token)):
                of_step[place] = _union(of_token[place], num_tokens)
            self._changed_everywhere()
        self._num_next_rows = num_requests

    def routed(
        self, layer: int, experts: Sequence[int], token_share_E: Sequence[float] | None, num_tokens: int
    ) -> None:
        """The layer's routing became known.

        Args:
            layer: MoE layer.
            experts: the distinct ones, in the order in which they count as used.
            token_share_E: the share of the step's tokens that were routed to each expert; None for a single token.
            num_tokens: of the step.
        """
        self.layer = layer
        self.version += 1
        self.changes[layer] += 1
        self.uses.routed(layer, experts)
        share_E = vec[float]([0.0] * self.num_experts if token_share_E is None else token_share_E)
        if token_share_E is None:
            for expert in experts:
                share_E[expert] = 1.0
        self._learn(layer, share_E, num_tokens)

    def _learn(self, layer: int, share_E: vec[float], num_tokens: int) -> None:
        short, long, of_token, of_step, later = (
            self._short, self._long, self._of_token, self._next, self._later_visits,
        )  # fmt: skip
        kept_short, kept_long = (1.0 - SHORT_DECAY) ** num_tokens, (1.0 - LONG_DECAY) ** num_tokens
        num_rows = self._num_next_rows
        place: i64 = layer * self.num_experts
        for share in share_E:
            short[place] = kept_short * short[place] + (1.0 - kept_short) * share
            long[place] = kept_long * long[place] + (1.0 - kept_long) * share
            average = (short[place] + long[place]) / 2.0
            probability = max(LAST_USE_WEIGHT * share + (1.0 - LAST_USE_WEIGHT) * average, LEAST_PROBABILITY)
            of_token[place] = probability
            if num_rows > 1:
                probability = _union(probability, num_rows)
            of_step[place] = probability
            later[place] = 1.0 / probability
            place += 1

    def hinted(self, layer: int, experts: Sequence[int], probabilities: Sequence[float]) -> None:
        """A hint, whose scores are probabilities, replaces the own estimate of the layer's next visit."""
        self.version += 1
        self.changes[layer] += 1
        of_step, later = self._next, self._later_visits
        first: i64 = layer * self.num_experts
        for place in range(first, first + self.num_experts):
            of_step[place] = UNLISTED_SHARE / later[place]
        for expert, probability in zip(experts, probabilities, strict=True):
            assert 0 <= expert < self.num_experts, "a hint is for this model"
            of_step[first + expert] = min(max(probability, LEAST_PROBABILITY), 1.0)

    def touched(self, layer: int, experts: Sequence[int]) -> None:
        """A hint names these experts of a layer, best first."""
        self.version += 1
        self.changes[layer] += 1
        self.uses.touched(layer, experts)

    def loaded(self, expert: ExpertId, is_needed: bool) -> None:
        """The expert comes into a slot."""
        self.changes[expert.layer] += 1
        self.uses.loaded(expert, is_needed)

    def next_probability_of(self, expert: ExpertId) -> float:
        """That the layer's next visit needs the expert."""
        return self._next[expert.layer * self.num_experts + expert.expert]

    def next_probabilities_of(self, layer: int) -> list[float]:
        """The same of all the layer's experts."""
        first = layer * self.num_experts
        return list(self._next[first : first + self.num_experts])

    def layers_until_visit(self, layer: int) -> int:
        """The next visit is 1 layer away for the layer after `self.layer`, and L layers for `self.layer` itself."""
        return (layer - self.layer - 1) % self.num_layers + 1

    def layers_missed(self, layer: int) -> vec[float]:
        """Expected number of layers from the layer's next visit until each of its experts is used.

        If the next visit does not need the expert, later ones are L layers apart. With `layers_until_visit` it is the
        time that Belady would know.
        """
        of_step, later = self._next, self._later_visits
        num_layers: float = float(self.num_layers)
        missed_E = vec[float]([0.0] * self.num_experts)
        place: i64 = layer * self.num_experts
        for expert in range(len(missed_E)):
            missed_E[expert] = num_layers * (1.0 - of_step[place]) * later[place]
            place += 1
        return missed_E

    def to_json(self) -> str:
        """Everything that decides, for a replay."""
        estimates = {name: self._by_layer(numbers) for name, numbers in self._estimates().items()}
        averages = [list(pair) for pair in zip(self._by_layer(self._short), self._by_layer(self._long), strict=True)]
        numbers = {"layer": self.layer, "num_next_rows": self._num_next_rows}
        return json.dumps({_AVERAGES: averages, **estimates, **self.uses.to_document(), **numbers})

    def load_json(self, text: str) -> None:
        """Undoes `to_json`.

        Raises:
            ValueError: it is not the history of such a model.
        """
        document = json.loads(text)
        counts = {f"{name}_LE": name for name in ARRAYS}
        lacking = {_AVERAGES, *self._estimates(), *counts, "layer", "clock", "num_next_rows"} - set(document)
        if lacking:
            raise ValueError(
                f"the history was kept by another version of promoe: it lacks {', '.join(sorted(lacking))}"
            )
        averages_LAE = np.asarray(document[_AVERAGES], np.float64)
        _check_shape(_AVERAGES, averages_LAE.shape, (self.num_layers, 2, self.num_experts))
        _overwrite(self._short, averages_LAE[:, 0])
        _overwrite(self._long, averages_LAE[:, 1])
        for name, numbers in self._estimates().items():
            estimates_LE = np.asarray(document[name], np.float64)
            _check_shape(name, estimates_LE.shape, (self.num_layers, self.num_experts))
            _overwrite(numbers, estimates_LE)
        for name, attribute in counts.items():
            counts_LE = np.asarray(document[name], np.int64)
            _check_shape(name, counts_LE.shape, (self.num_layers, self.num_experts))
            setattr(self.uses, attribute, counts_LE.tolist())
        self.layer = int(document["layer"])
        self.uses.clock = int(document["clock"])
        self._num_next_rows = int(document["num_next_rows"])
        self._changed_everywhere()

    def _estimates(self) -> dict[str, vec[float]]:
        """By their names in a snapshot's document."""
        return {
            "_token_probability_LE": self._of_token,
            "next_probability_LE": self._next,
            "later_visits_LE": self._later_visits,
        }

    def _by_layer(self, numbers: vec[float]) -> list[list[float]]:
        width = self.num_experts
        return [list(numbers[first : first + width]) for first in range(0, len(numbers), width)]

    def _changed_everywhere(self) -> None:
        self.version += 1
        for layer in range(self.num_layers):
            self.changes[layer] += 1


_AVERAGES: Final = "_averages_L2E"
"""In a snapshot's document: the short and the long one, by layer."""


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"the history's {name} has the shape {shape}, not {expected}")


def _overwrite(numbers: vec[float], by_layer: FloatArray) -> None:
    for place, number in enumerate(by_layer.ravel().tolist()):
        numbers[place] = number


def _union(probability: float, num_tokens: int) -> float:
    """That at least one of several tokens needs it."""
    return 1.0 - (1.0 - probability) ** num_tokens
