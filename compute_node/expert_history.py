"""What eviction may look at: when and how often experts were used, and how likely each is to be needed next.

Shapes: L MoE layers, E experts. Owned by the engine thread. Probabilities are per layer visit: every layer is visited
once a step, in order, so the next visit of layer l is a number of layers away that everybody can count.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from promoe.hint import Float32Array, IdArray
from promoe.ids import ExpertId

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DECAYS: Final = (0.1, 0.02)
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
        last_use_LE: value of the use counter when the expert was last routed (larger is later).
        last_touch_LE: the same, but being hinted counts too.
        num_uses_LE: times routed since it was loaded.
        num_routed_LE: times routed since the start.
        next_probability_LE: that the layer's next visit needs the expert.
        later_visits_LE: expected visits until use when the next visit does not need it.
        layer: the layer whose routing became known last; -1 at the beginning of a step.
        version: changes whenever estimates of the next use do.
        epoch: changes with everything that changes many experts' scores: a routing, a step, hints that count as uses.
    """

    def __init__(self, num_layers: int, num_experts: int, experts_per_token: int) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._experts_per_token = experts_per_token
        self._layers_L = np.arange(num_layers)
        self.version = 0
        self.epoch = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        shape = (self.num_layers, self.num_experts)
        start = self._experts_per_token / self.num_experts
        self.last_use_LE: IntArray = np.zeros(shape, np.int64)
        self.last_touch_LE: IntArray = np.zeros(shape, np.int64)
        self.num_uses_LE: IntArray = np.zeros(shape, np.int64)
        self.num_routed_LE: IntArray = np.zeros(shape, np.int64)
        self._averages_L2E: FloatArray = np.full((self.num_layers, len(DECAYS), self.num_experts), start)
        self._token_probability_LE: FloatArray = np.full(shape, start)
        self.next_probability_LE: FloatArray = np.full(shape, start)
        self.later_visits_LE: FloatArray = np.full(shape, 1 / start)
        self.layer = -1
        self.version += 1
        self.epoch += 1
        self._clock = 0
        self._num_next_rows = 1

    def begin_step(self, num_tokens: int, num_requests: int) -> None:
        """The next visits are this step's, of `num_tokens` tokens; the step after it has a token per request."""
        self.layer = -1
        self.version += 1
        self.epoch += 1
        if num_tokens != self._num_next_rows:
            self.next_probability_LE = _union(self._token_probability_LE, num_tokens)
        self._num_next_rows = num_requests

    def routed(self, layer: int, experts: Sequence[int], token_share_E: FloatArray | None, num_tokens: int) -> None:
        """The layer's routing became known.

        Args:
            layer: MoE layer.
            experts: the distinct ones, in the order in which they count as used.
            token_share_E: the share of the step's tokens that were routed to each expert; None for a single token.
            num_tokens: of the step.
        """
        self.layer = layer
        self.version += 1
        self.epoch += 1
        chosen = list(experts)
        ticks = np.arange(self._clock + 1, self._clock + len(chosen) + 1)
        self._clock += len(chosen)
        self.last_use_LE[layer, chosen] = ticks
        self.last_touch_LE[layer, chosen] = ticks
        self.num_uses_LE[layer, chosen] += 1
        self.num_routed_LE[layer, chosen] += 1
        if token_share_E is None:
            token_share_E = np.zeros(self.num_experts)
            token_share_E[chosen] = 1.0
        averages_2E = self._averages_L2E[layer]
        averages_2E += _weight_of(num_tokens) * (token_share_E - averages_2E)
        probability_E = (1 - LAST_USE_WEIGHT) / len(DECAYS) * averages_2E.sum(axis=0)
        probability_E += LAST_USE_WEIGHT * token_share_E
        probability_E = np.maximum(probability_E, LEAST_PROBABILITY)
        self._token_probability_LE[layer] = probability_E
        if self._num_next_rows > 1:
            probability_E = _union(probability_E, self._num_next_rows)
        self.next_probability_LE[layer] = probability_E
        self.later_visits_LE[layer] = 1 / probability_E

    def hinted(self, layer: int, experts: IdArray, probabilities: Float32Array) -> None:
        """A calibrated hint replaces the own estimate of the layer's next visit."""
        self.version += 1
        row_E = UNLISTED_SHARE / self.later_visits_LE[layer]
        row_E[experts] = np.minimum(np.maximum(probabilities, LEAST_PROBABILITY), 1.0)
        self.next_probability_LE[layer] = row_E

    def touched(self, layer: int, experts: Sequence[int]) -> None:
        """A hint names these experts of a layer; later ones of the list count as touched earlier (ProMoE §6.1)."""
        self.version += 1
        self.epoch += 1
        for expert in reversed(experts):
            self._clock += 1
            self.last_touch_LE[layer, expert] = self._clock

    def loaded(self, expert: ExpertId, is_needed: bool) -> None:
        """The expert comes into a slot. What nobody needed yet counts as used now, or it would be the first to go."""
        self.num_uses_LE[expert] = 1 if is_needed else 0
        if not is_needed:
            self._clock += 1
            self.last_use_LE[expert] = self._clock
            self.last_touch_LE[expert] = self._clock

    def layers_until_use(self, layers: slice) -> FloatArray:
        """Expected number of layers until each expert of these layers is used, the time that Belady would know.

        The next visit is 1 layer away for the layer after `layer` and L layers for `layer` itself; if it does not need
        the expert, later ones are L layers apart.
        """
        until_visit_L = (self._layers_L[layers] - self.layer - 1) % self.num_layers + 1
        missed_LE = self.num_layers - self.num_layers * self.next_probability_LE[layers]
        missed_LE *= self.later_visits_LE[layers]
        missed_LE += until_visit_L[:, None]
        expected: FloatArray = missed_LE
        return expected

    def to_json(self) -> str:
        """Everything that decides, for a replay."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        numbers = {"layer": self.layer, "clock": self._clock, "num_next_rows": self._num_next_rows}
        return json.dumps({**arrays, **numbers})

    def load_json(self, text: str) -> None:
        """Undoes `to_json`.

        Raises:
            ValueError: it is not the history of such a model.
        """
        document = json.loads(text)
        lacking = {*_ARRAYS, "layer", "clock", "num_next_rows"} - set(document)
        if lacking:
            raise ValueError(
                f"the history was kept by another version of promoe: it lacks {', '.join(sorted(lacking))}"
            )
        for name in _ARRAYS:
            array = np.asarray(document[name], dtype=getattr(self, name).dtype)
            if array.shape != getattr(self, name).shape:
                raise ValueError(f"the history's {name} has the shape {array.shape}")
            setattr(self, name, array)
        self.version += 1
        self.epoch += 1
        self.layer = int(document["layer"])
        self._clock = int(document["clock"])
        self._num_next_rows = int(document["num_next_rows"])


_ARRAYS: Final = (
    *("last_use_LE", "last_touch_LE", "num_uses_LE", "num_routed_LE"),
    *("_averages_L2E", "_token_probability_LE", "next_probability_LE", "later_visits_LE"),
)


@lru_cache(maxsize=64)
def _weight_of(num_tokens: int) -> FloatArray:
    """How much so many tokens at once change the averages, (averages, 1)."""
    weights: FloatArray = 1 - (1 - np.array(DECAYS)) ** num_tokens
    return weights[:, None]


def _union(probability: FloatArray, num_tokens: int) -> FloatArray:
    """That at least one of several tokens needs it."""
    union: FloatArray = 1 - (1 - probability) ** num_tokens
    return union
