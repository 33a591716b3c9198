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
from predictor_service.predictors.logistic import sigmoid
from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.ranking import Ranking, target_of, union
from predictor_service.predictors.step_state import StepState, multi_hot
from promoe.hint import Float32Array, Hint, IdArray, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

_LEARNING_RATE: Final = 0.08

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
        """See PredictorSession. What the step before taught is learned now, when no hint waits for it."""
        self._learn()
        self._state.begin(start)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession."""
        self._state.learn(observation)
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
        return sigmoid(self._bias_LE[layer] + self._weights_LEE[layer][source_RK].sum(axis=1))

    def _source(self, layer: int) -> IdArray | None:
        """Routing of the same rows in the source layer, for the first layers of the step before, if it is known."""
        source = layer - self._lookahead
        routings = self._state.routings if source >= 0 else self._state.former_routings
        source_RK = routings.get(source % self._spec.num_moe_layers)
        routed_RK = self._state.routings[layer]
        return source_RK if source_RK is not None and source_RK.shape == routed_RK.shape else None

    def _learn(self) -> None:
        """One step down the gradient of the cross-entropy, for every layer whose source is known, all rows together."""
        routings = self._state.routings
        num_rows = max(map(len, routings.values()), default=0)
        sources = {
            layer: source_RK
            for layer in routings
            if len(routings[layer]) == num_rows and (source_RK := self._source(layer)) is not None
        }
        if not num_rows or not sources:
            return
        layers = list(sources)
        source_LRK = np.stack(list(sources.values()))
        routed_RK = np.concatenate([routings[layer] for layer in layers])
        index_L1 = np.array(layers)[:, None]
        logits_LRE = self._weights_LEE[index_L1[:, None], source_LRK].sum(axis=2) + self._bias_LE[layers][:, None]
        hot_LRE = multi_hot(routed_RK, self._spec.num_experts).reshape(logits_LRE.shape)
        step_LRE = _LEARNING_RATE * (hot_LRE - sigmoid(logits_LRE))
        self._bias_LE[layers] += step_LRE.sum(axis=1)
        for row in range(num_rows):  # an expert comes once in a row, but in several rows
            self._weights_LEE[index_L1, source_LRK[:, row]] += step_LRE[:, row, None]
