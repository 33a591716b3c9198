"""`transition`: which experts of a layer follow which of an earlier one, learned while it serves.

One logistic regression per layer, from the experts of the layer `lookahead` before (for the first layers: of the same
request's former token) to this layer's, by stochastic gradient descent on cross-entropy. On the demo model's text and
chat it recalls .58 of 8 experts; naive Bayes on the same co-activation counts .49, because a token's experts are far
from independent of each other.
Shapes: L MoE layers, R sampled rows (tokens), K experts per token, E experts.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from predictor_service.predictor import PredictorSource
from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.ranking import Ranking, target_of, union
from predictor_service.predictors.step_state import StepState, multi_hot
from promoe.hint import Float32Array, Hint, IdArray, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

_LEARNING_RATE: Final = 0.08
_LOWEST_LOGIT: Final = np.float32(-60)
"""Its exponential is still a number."""

VERSION: Final = PredictorVersion(
    version="transition@1",
    predictor="transition",
    observed=ObservedKind.NONE,
    lookaheads=(2,),
    calibrated=True,
    wants_routing=True,
)


class TransitionPredictor:
    """Starts from the uniform guess in every session."""

    def __init__(self, source: PredictorSource) -> None:
        self.version = at_lookahead(VERSION, source)
        self._spec = source.spec

    def open_session(self) -> "TransitionSession":
        """See Predictor."""
        return TransitionSession(self._spec, self.version)


class TransitionSession:
    """What one node's tokens have taught. The weights' first E index is the source layer's expert."""

    def __init__(self, spec: ModelSpec, version: PredictorVersion) -> None:
        self._spec = spec
        (self._lookahead,) = version.lookaheads
        self._state = StepState()
        self._ranking = Ranking(spec, version.version)
        layers, experts = spec.num_moe_layers, spec.num_experts
        self._weights_LEE = np.zeros((layers, experts, experts), np.float32)
        share = min(spec.experts_per_token / experts, 0.99)
        self._bias_LE = np.full((layers, experts), np.log(share / (1 - share)), np.float32)

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession."""
        self._state.begin(start)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession."""
        for layer in self._state.learn(observation):
            self._learn(layer)
        source_RK = self._state.routings.get(observation.layer)
        if source_RK is None or not len(source_RK) or self._state.is_prefill:
            return ()
        target = target_of(observation, self._lookahead, self._spec.num_moe_layers)
        num_tokens = self._state.num_tokens_at(target.step)
        needed_E = union(self._probability(target.layer, source_RK), num_tokens)
        return (self._ranking.hint(observation, target, needed_E, num_tokens),)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession; what was learned stays."""

    def _probability(self, layer: int, source_RK: IdArray) -> Float32Array:
        """(R, E)"""
        logits_RE = self._bias_LE[layer] + self._weights_LEE[layer][source_RK].sum(axis=1)
        probability_RE: Float32Array = 1 / (1 + np.exp(-np.maximum(logits_RE, _LOWEST_LOGIT)))
        return probability_RE

    def _learn(self, layer: int) -> None:
        """One step down the gradient of the cross-entropy, of all rows together."""
        source = layer - self._lookahead
        routings = self._state.routings if source >= 0 else self._state.former_routings
        source_RK = routings.get(source % self._spec.num_moe_layers)
        topk_ids_RK = self._state.routings[layer]
        if source_RK is None or len(source_RK) != len(topk_ids_RK):
            return
        error_RE = multi_hot(topk_ids_RK, self._spec.num_experts) - self._probability(layer, source_RK)
        step_RE = _LEARNING_RATE * error_RE
        self._bias_LE[layer] += step_RE.sum(axis=0)
        for row, experts_K in enumerate(source_RK):
            self._weights_LEE[layer][experts_K] += step_RE[row]
