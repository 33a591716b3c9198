"""`gate_ahead`: the routers of later layers read this layer's `router_input`; nothing is trained beforehand.

The residual stream changes little from layer to layer (Mixtral-offloading, Pre-gated MoE, FATE). The hidden states keep
the observed layer's norm weights: putting the target layer's in their place gives 1 point of recall more on the demo
model (.660 against .647 at lookahead 2), and its weights are not among a pack's routers.

A score becomes a probability by its margin: how far it is above the border between chosen and not chosen, as a share of
the scores' range. One slope per layer and one offset per expert are fitted online to the routing that followed, by
gradient descent on cross-entropy; the offsets learn what a router of a later layer misjudges systematically (recall@8
.65 -> .71 at lookahead 2, recall@12 .80 -> .86, expected calibration error .003).
Shapes: L MoE layers, R sampled rows (tokens), D hidden, K experts per token, E experts.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from predictor_service.predictor import PredictorSource
from predictor_service.predictors.logistic import sigmoid
from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.ranking import Ranking, target_of, union
from predictor_service.predictors.step_state import StepState, multi_hot
from predictor_service.routers import Routers, read_routers
from promoe.hint import Float32Array, Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

_FIRST_SLOPE: Final = 9.0
_SLOPE_RATE: Final = 3.0
_OFFSET_RATE: Final = 0.05

VERSION: Final = PredictorVersion(
    version="gate_ahead@1",
    predictor="gate_ahead",
    observed=ObservedKind.ROUTER_INPUT,
    lookaheads=(2,),
    calibrated=True,
    wants_routing=True,
)


class GateAheadPredictor:
    """Holds the pack's routers; raises ModelUnsupported for a family whose routers cannot be used."""

    def __init__(self, source: PredictorSource) -> None:
        self.version = at_lookahead(VERSION, source)
        self._spec = source.spec
        self._routers = read_routers(source.pack, source.spec)

    def open_session(self) -> "GateAheadSession":
        """See Predictor."""
        return GateAheadSession(self._spec, self._routers, self.version)


class GateAheadSession:
    """Fits its map from margins to probabilities to one node's tokens."""

    def __init__(self, spec: ModelSpec, routers: Routers, version: PredictorVersion) -> None:
        self._spec = spec
        (self._lookahead,) = version.lookaheads
        self._routers = routers
        self._state = StepState()
        self._ranking = Ranking(spec, version.version)
        self._slope_L = np.full(spec.num_moe_layers, _FIRST_SLOPE, np.float32)
        self._offset_LE = np.zeros((spec.num_moe_layers, spec.num_experts), np.float32)
        # By target layer, of the running step.
        self._margins: dict[int, Float32Array] = {}

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession. What the step before taught is learned now, when no hint waits for it."""
        self._learn()
        self._state.begin(start)
        self._margins.clear()

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession. A token's last layers say nothing of the next token's first ones."""
        self._state.learn(observation)
        target = target_of(observation, self._lookahead, self._spec.num_moe_layers)
        hidden_RD = observation.hidden_RD
        if hidden_RD is None or not len(hidden_RD) or target.step != observation.step:
            return ()
        margin_RE = self._margin(self._routers.scores(target.layer, hidden_RD))
        self._margins[target.layer] = margin_RE
        if self._state.is_prefill:
            return ()
        num_tokens = observation.num_tokens
        needed_E = union(self._probability(target.layer, margin_RE), num_tokens)
        return (self._ranking.hint(observation, target, needed_E, num_tokens),)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession; what was fitted stays."""

    def _margin(self, scores_RE: Float32Array) -> Float32Array:
        """(R, E): above 0 the top k, below 0 the others, in units of the scores' range."""
        chosen = self._spec.experts_per_token
        if chosen >= self._spec.num_experts:
            return np.ones_like(scores_RE)
        sorted_RE = np.sort(scores_RE, axis=1)
        border_R = (sorted_RE[:, -chosen] + sorted_RE[:, -chosen - 1]) / 2
        range_R = sorted_RE[:, -1] - sorted_RE[:, 0] + 1e-6
        margin_RE: Float32Array = (scores_RE - border_R[:, None]) / range_R[:, None]
        return margin_RE

    def _probability(self, layer: int, margin_RE: Float32Array) -> Float32Array:
        """(R, E)"""
        return sigmoid(self._slope_L[layer] * margin_RE + self._offset_LE[layer])

    def _learn(self) -> None:
        """One step down the gradient of the cross-entropy, for every layer whose hint the routing has answered."""
        routings = self._state.routings
        num_rows = max(map(len, self._margins.values()), default=0)
        layers = [
            layer
            for layer, margin_RE in self._margins.items()
            if layer in routings and len(margin_RE) == len(routings[layer]) == num_rows
        ]
        if not layers:
            return
        margin_LRE = np.stack([self._margins[layer] for layer in layers])
        routed_RK = np.concatenate([routings[layer] for layer in layers])
        hot_LRE = multi_hot(routed_RK, self._spec.num_experts).reshape(margin_LRE.shape)
        slope_L11, offset_L1E = self._slope_L[layers][:, None, None], self._offset_LE[layers][:, None]
        error_LRE = hot_LRE - sigmoid(slope_L11 * margin_LRE + offset_L1E)
        slope_L = self._slope_L[layers] + _SLOPE_RATE * (error_LRE * margin_LRE).mean(axis=(1, 2))
        self._slope_L[layers] = np.maximum(slope_L, 0.0)
        self._offset_LE[layers] += _OFFSET_RATE * error_LRE.sum(axis=1)
