"""What eviction may look at: when and how often experts were used, and how likely each is to be needed next.

Shapes: L MoE layers, E experts, A averages. Owned by the engine thread. Probabilities are per layer visit: every layer
is visited once a step, in order, so the next visit of layer l is a number of layers away that everybody can count.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from compute_node.expert_uses import ARRAYS, ExpertUses
from promoe.hint import Float32Array, IdArray
from promoe.ids import ExpertId

FloatArray = npt.NDArray[np.float64]

DECAYS: Final[tuple[float, ...]] = (0.1, 0.02)
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
        self._mix_A: FloatArray = np.full(len(DECAYS), (1 - LAST_USE_WEIGHT) / len(DECAYS))
        self.version = 0
        self.epoch = 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        shape = (self.num_layers, self.num_experts)
        start = self._experts_per_token / self.num_experts
        self.uses = ExpertUses(self.num_layers, self.num_experts)
        self._averages_LAE: FloatArray = np.full((self.num_layers, len(DECAYS), self.num_experts), start)
        self._token_probability_LE: FloatArray = np.full(shape, start)
        self.next_probability_LE: FloatArray = np.full(shape, start)
        self.later_visits_LE: FloatArray = np.full(shape, 1 / start)
        self.layer = -1
        self.version += 1
        self.epoch += 1
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
            token_share_E: the share of the step's tokens that were routed to each expert, which is overwritten; None
                for a single token.
            num_tokens: of the step.
        """
        self.layer = layer
        self.version += 1
        self.epoch += 1
        self.uses.routed(layer, experts)
        if token_share_E is None:
            token_share_E = np.zeros(self.num_experts)
            token_share_E[list(experts)] = 1.0
        weight_A1, kept_A1 = _weights_of(num_tokens)
        averages_AE = self._averages_LAE[layer]
        averages_AE *= kept_A1
        averages_AE += weight_A1 * token_share_E
        token_share_E *= LAST_USE_WEIGHT
        token_share_E += self._mix_A @ averages_AE
        probability_E = self._token_probability_LE[layer]
        np.maximum(token_share_E, LEAST_PROBABILITY, out=probability_E)
        if self._num_next_rows > 1:
            probability_E = _union(probability_E, self._num_next_rows)
        self.next_probability_LE[layer] = probability_E
        np.divide(1, probability_E, out=self.later_visits_LE[layer])

    def hinted(self, layer: int, experts: IdArray, probabilities: Float32Array) -> None:
        """A hint, whose scores are probabilities, replaces the own estimate of the layer's next visit."""
        self.version += 1
        row_E = self.next_probability_LE[layer]
        np.divide(UNLISTED_SHARE, self.later_visits_LE[layer], out=row_E)
        row_E[experts] = np.minimum(np.maximum(probabilities, LEAST_PROBABILITY), 1.0)

    def touched(self, layer: int, experts: Sequence[int]) -> None:
        """A hint names these experts of a layer, best first."""
        self.version += 1
        self.epoch += 1
        self.uses.touched(layer, experts)

    def loaded(self, expert: ExpertId, is_needed: bool) -> None:
        """The expert comes into a slot."""
        self.uses.loaded(expert, is_needed)

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

    def layers_until_use_of(self, expert: ExpertId) -> float:
        """The same of one expert, to the last bit."""
        until_visit = (expert.layer - self.layer - 1) % self.num_layers + 1
        missed = self.num_layers - self.num_layers * self.next_probability_LE.item(expert)
        return missed * self.later_visits_LE.item(expert) + until_visit

    def to_json(self) -> str:
        """Everything that decides, for a replay."""
        arrays = {name: getattr(self, attribute).tolist() for name, attribute in _ESTIMATES.items()}
        numbers = {"layer": self.layer, "num_next_rows": self._num_next_rows}
        return json.dumps({**arrays, **self.uses.to_document(), **numbers})

    def load_json(self, text: str) -> None:
        """Undoes `to_json`.

        Raises:
            ValueError: it is not the history of such a model.
        """
        document = json.loads(text)
        counts = {f"{name}_LE": name for name in ARRAYS}
        lacking = {*_ESTIMATES, *counts, "layer", "clock", "num_next_rows"} - set(document)
        if lacking:
            raise ValueError(
                f"the history was kept by another version of promoe: it lacks {', '.join(sorted(lacking))}"
            )
        for name, attribute in _ESTIMATES.items():
            former: FloatArray = getattr(self, attribute)
            estimates = np.asarray(document[name], np.float64)
            _check_shape(name, estimates.shape, former.shape)
            setattr(self, attribute, estimates)
        for name, attribute in counts.items():
            numbers = np.asarray(document[name], np.int64)
            _check_shape(name, numbers.shape, (self.num_layers, self.num_experts))
            setattr(self.uses, attribute, numbers.tolist())
        self.version += 1
        self.epoch += 1
        self.layer = int(document["layer"])
        self.uses.clock = int(document["clock"])
        self._num_next_rows = int(document["num_next_rows"])


_ESTIMATES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "_averages_L2E": "_averages_LAE",
        "_token_probability_LE": "_token_probability_LE",
        "next_probability_LE": "next_probability_LE",
        "later_visits_LE": "later_visits_LE",
    }
)
"""In a snapshot's document and here."""


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"the history's {name} has the shape {shape}, not {expected}")


@lru_cache(maxsize=64)
def _weights_of(num_tokens: int) -> tuple[FloatArray, FloatArray]:
    """How much so many tokens at once change the averages, and how much of them stays, (averages, 1) each."""
    kept: FloatArray = (1 - np.array(DECAYS)[:, None]) ** num_tokens
    return 1 - kept, kept


def _union(probability: FloatArray, num_tokens: int) -> FloatArray:
    """That at least one of several tokens needs it."""
    union: FloatArray = 1 - (1 - probability) ** num_tokens
    return union
