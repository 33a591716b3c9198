"""From probabilities of single tokens to a hint for a layer: the union over the step's tokens, ranked.

Shapes: R sampled rows (tokens), E experts.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from promoe.hint import Float32Array, Hint, Observation
from promoe.model_spec import ModelSpec

MIN_PROBABILITY: Final = 0.02
"""Experts less probable than this are left out of a hint: no cache fetches them ahead."""

_LARGEST: Final = np.float32(1 - 1e-6)


@dataclass(frozen=True)
class HintTarget:
    """What a hint is for."""

    step: int
    layer: int


def target_of(observation: Observation, lookahead: int, num_moe_layers: int) -> HintTarget:
    """The layer `lookahead` after the observed one; behind the last layer comes the next step's first."""
    steps, layer = divmod(observation.layer + lookahead, num_moe_layers)
    return HintTarget(observation.step + steps, layer)


def union(probability_RE: Float32Array, num_tokens: int) -> Float32Array:
    """(E,) that at least one of the tokens needs the expert, from a sample of them taken as independent.

    1 - prod(1 - p) over the rows, to the power tokens / rows where only a sample was seen.
    """
    num_rows = len(probability_RE)
    if num_rows == num_tokens == 1:
        only_E: Float32Array = probability_RE[0]
        return only_E
    spared_E = np.prod(1.0 - np.minimum(probability_RE, _LARGEST), axis=0)
    if num_rows != num_tokens:
        spared_E **= num_tokens / num_rows
    needed_E: Float32Array = (1.0 - spared_E).astype(np.float32)
    return needed_E


class Ranking:
    """Makes the hints of one version."""

    def __init__(self, spec: ModelSpec, version: str) -> None:
        self._spec = spec
        self._version = version

    def hint(self, observation: Observation, target: HintTarget, needed_E: Float32Array, num_tokens: int) -> Hint:
        """Ranks the experts by the probability that the layer needs them, which `num_tokens` tokens go through."""
        per_token = self._spec.experts_per_token
        num_expected = per_token
        if num_tokens > 1:
            most = min(self._spec.num_experts, per_token * num_tokens)
            num_expected = min(max(round(float(needed_E.sum())), per_token), most)
        order_E = np.argsort(-needed_E)
        scores = needed_E[order_E]
        num_hinted = max(num_expected, int(np.count_nonzero(scores >= MIN_PROBABILITY)))
        return Hint(
            step=target.step,
            layer=target.layer,
            observed_step=observation.step,
            observed_layer=observation.layer,
            experts=order_E[:num_hinted].astype(np.uint16),
            scores=scores[:num_hinted],
            num_expected=num_expected,
            version=self._version,
        )
