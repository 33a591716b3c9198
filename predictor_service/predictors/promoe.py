"""`promoe`: the predictor of the paper, as it is described and as its source has it, to be compared with.

Per pair of a source and the target layer `lookahead` after it a two-layer network with relu reads the hidden states
entering the source's decoder layer; the output of the last decoder layer predicts the next token's first layers, in
place of the first source. It hints the top k of a token; in a batch scores are summed over the rows and k stays; where
a step has more than one token of a request (a prompt), it is silent. arXiv 2410.22134, sections 4.3, 4.4 and 6.3.
Shapes: L MoE layers, R sampled rows (tokens), D hidden, H hidden units, E experts, N pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from predictor_service.predictor import PredictorSource
from predictor_service.predictors.learned import open_artifact, served_lookaheads
from predictor_service.predictors.ranking import target_of
from promoe.hint import Float32Array, Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

KIND: Final = "promoe"
FEATURES: Final = ("layer_input",)


@dataclass(frozen=True)
class LayerPair:
    """A source, where the number of MoE layers stands for the last output, and how many layers later its target is."""

    source: int
    lookahead: int


def layer_pairs(num_moe_layers: int, lookahead: int) -> tuple[LayerPair, ...]:
    """Every target layer once: the first ones from the last output, each later one from `lookahead` layers before."""
    first = [LayerPair(num_moe_layers, target) for target in range(min(lookahead + 1, num_moe_layers))]
    return (*first, *(LayerPair(source, lookahead) for source in range(1, num_moe_layers - lookahead)))


class PromoePredictor:
    """The networks of all pairs; raises what `open_artifact` and `served_lookaheads` raise."""

    def __init__(self, source: PredictorSource) -> None:
        artifact = open_artifact(KIND, source)
        manifest, self.spec = artifact.manifest, source.spec
        (lookahead,) = served_lookaheads(artifact, source)
        pairs = layer_pairs(self.spec.num_moe_layers, lookahead)
        experts, hidden = self.spec.num_experts, self.spec.hidden_size
        units = int(manifest.training.get("hidden_units", 0))
        self._in_weight_NHD = artifact.tensor("in.weight", (len(pairs), units, hidden))
        self._in_bias_NH = artifact.tensor("in.bias", (len(pairs), units))
        self._out_weight_NEH = artifact.tensor("out.weight", (len(pairs), experts, units))
        self._out_bias_NE = artifact.tensor("out.bias", (len(pairs), experts))
        self.lookaheads_of: dict[int, dict[int, int]] = {}
        for index, pair in enumerate(pairs):
            self.lookaheads_of.setdefault(pair.source, {})[pair.lookahead] = index
        self.version = PredictorVersion(
            version=f"{manifest.name}@{manifest.version}",
            predictor=KIND,
            observed=ObservedKind.LAYER_INPUT,
            lookaheads=(lookahead,),
            calibrated=False,
            wants_routing=False,
        )

    def open_session(self) -> "PromoeSession":
        """See Predictor."""
        return PromoeSession(self, self.spec)

    def scores(self, pair: int, hidden_RD: Float32Array) -> Float32Array:
        """(R, E): a priority per expert, like a router's output; no probability."""
        units_RH = np.maximum(hidden_RD @ self._in_weight_NHD[pair].T + self._in_bias_NH[pair], 0)
        scores_RE: Float32Array = units_RH @ self._out_weight_NEH[pair].T + self._out_bias_NE[pair]
        return scores_RE


class PromoeSession:
    """Keeps nothing but whether the running step has a prompt."""

    def __init__(self, predictor: PromoePredictor, spec: ModelSpec) -> None:
        self._predictor = predictor
        self._spec = spec
        self._is_prefill = False

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession."""
        self._is_prefill = any(span.is_prefill for span in start.spans)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession."""
        hidden_RD = observation.hidden_RD
        if hidden_RD is None or not len(hidden_RD) or self._is_prefill:
            return ()
        pairs = self._predictor.lookaheads_of.get(observation.layer, {})
        return [self._hint(observation, lookahead, pair, hidden_RD) for lookahead, pair in pairs.items()]

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession; nothing is kept."""

    def _hint(self, observation: Observation, lookahead: int, pair: int, hidden_RD: Float32Array) -> Hint:
        scores_E = self._predictor.scores(pair, hidden_RD).sum(axis=0)
        order_E = np.argsort(-scores_E)
        target = target_of(observation, lookahead, self._spec.num_moe_layers)
        return Hint(
            step=target.step,
            layer=target.layer,
            observed_step=observation.step,
            observed_layer=observation.layer,
            experts=order_E.astype(np.uint16),
            scores=scores_E[order_E],
            num_expected=self._spec.experts_per_token,
            version=self._predictor.version.version,
        )
