"""`learned`: our own trained predictor. One small network per MoE layer reads its `router_input` and looks at several
later layers at once; behind the last layer come the next step's first ones.

    router_input ──► trunk: H relu units ─┬─► one head per lookahead ─► (+) ─► probability per expert
                       and a signature ───┘                             ▲
    the request's last token at the target layer: routed, popular, signature

The trunk is shared by the lookaheads, so that an observation costs two matrix products. Differs from ProMoE (see
`promoe.py`) by what it reads, by memory of the request, by cross-entropy on soft targets, and by calibrated scores.
Shapes: L MoE layers, R sampled rows (tokens), D hidden, H trunk, A lookaheads, E experts.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from predictor_service.artifact import Artifact, read_artifact
from predictor_service.packaged import packaged_artifact
from predictor_service.predictor import PredictorSession, PredictorSource
from predictor_service.predictors.ranking import HintTarget, Ranking, target_of, union
from predictor_service.predictors.request_history import NUM_FEATURES, RequestHistory, requests_of_rows
from promoe.config import SettingUnfit
from promoe.errors import InvalidInput, ModelNotFound
from promoe.hint import Float32Array, Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

KIND: Final = "learned"
FEATURES: Final = ("router_input", "routed_before", "popular", "signature_before")

_LOWEST_LOGIT: Final = np.float32(-60)
"""Its exponential is still a number."""


def open_artifact(kind: str, source: PredictorSource) -> Artifact:
    """The artifact that was given, or the packaged one for this model.

    Raises:
        ModelNotFound: there is none.
        InvalidInput: it is damaged or of another kind.
        ModelMismatch: it was trained for another model.
    """
    path = source.artifact or packaged_artifact(source.spec.fingerprint, kind)
    if path is None:
        raise ModelNotFound(
            f"No {kind} predictor comes with promoe for {source.spec.name} (fingerprint {source.spec.fingerprint}). "
            "Train one with `promoe predictor train` and name it with --artifact."
        )
    artifact = read_artifact(path)
    if artifact.manifest.kind != kind:
        raise InvalidInput(f"{path} is an artifact of the predictor {artifact.manifest.kind}, not of {kind}.")
    artifact.manifest.check_model(source.spec, path)
    return artifact


MOST_SERVED: Final = 2
"""Lookaheads that are served unless one is asked for, the nearest, and of as many layers one is observed: so every
layer is hinted once. Observations and hints take time from the compute node's engine thread; a second hint for a layer
was not worth it, nor was one from farther away (DECISIONS.md)."""


def served_lookaheads(artifact: Artifact, source: PredictorSource) -> tuple[int, ...]:
    """The artifact's nearest, or the one that was asked for; raises SettingUnfit if it was not trained for it."""
    trained = artifact.manifest.lookaheads
    if source.lookahead is None:
        return tuple(sorted(trained)[:MOST_SERVED])
    if source.lookahead not in trained:
        raise SettingUnfit(
            f"lookahead is {source.lookahead}; {artifact.path} was trained for {', '.join(map(str, trained))}"
        )
    return (source.lookahead,)


def _layers_until_hinted_again(lookaheads: Sequence[int]) -> int:
    """Observing one of so many layers, every layer is hinted once; 1 where these lookaheads leave layers out."""
    num = len(lookaheads)
    return num if len({lookahead % num for lookahead in lookaheads}) == num else 1


class LearnedPredictor:
    """The networks of all layers.

    Raises:
        ModelNotFound, InvalidInput, ModelMismatch: see `open_artifact`.
        SettingUnfit: see `served_lookaheads`.
    """

    def __init__(self, source: PredictorSource) -> None:
        artifact = open_artifact(KIND, source)
        manifest, self.spec = artifact.manifest, source.spec
        layers, experts, hidden = self.spec.num_moe_layers, self.spec.num_experts, self.spec.hidden_size
        lookaheads = served_lookaheads(artifact, source)
        num_trained = len(manifest.lookaheads)
        trunk = int(manifest.training.get("trunk_units", 0))
        self.trunk_units = trunk
        self.in_weight_LOD = artifact.tensor("in.weight", (layers, trunk + experts, hidden))
        self.in_bias_LO = artifact.tensor("in.bias", (layers, trunk + experts))
        served = [manifest.lookaheads.index(lookahead) for lookahead in lookaheads]
        out_LAEO = artifact.tensor("out.weight", (layers, num_trained * experts, trunk + experts))
        out_LAEO = out_LAEO.reshape(layers, num_trained, experts, -1)[:, served]
        self.out_weight_LOO = np.ascontiguousarray(out_LAEO.reshape(layers, len(served) * experts, -1))
        bias_LAE = artifact.tensor("out.bias", (layers, num_trained, experts))[:, served]
        self.out_bias_LO = np.ascontiguousarray(bias_LAE.reshape(layers, -1))
        memory_LAFE = artifact.tensor("memory.weight", (layers, num_trained, NUM_FEATURES * experts, experts))
        self.memory_weight_LAFE = np.ascontiguousarray(memory_LAFE[:, served])
        self.version = PredictorVersion(
            version=f"{manifest.name}@{manifest.version}",
            predictor=KIND,
            observed=ObservedKind.ROUTER_INPUT,
            lookaheads=lookaheads,
            calibrated=True,
            wants_routing=True,
            observe_every=_layers_until_hinted_again(lookaheads),
        )

    def open_session(self) -> "LearnedSession":
        """See Predictor."""
        return LearnedSession(self, self.spec)

    def has_signatures_of(self, other: "LearnedPredictor") -> bool:
        """Whether both make the same of what the router reads."""
        mine, theirs = self.in_weight_LOD[:, self.trunk_units :], other.in_weight_LOD[:, other.trunk_units :]
        return np.array_equal(mine, theirs)

    def trunk(self, layer: int, hidden_RD: Float32Array) -> tuple[Float32Array, Float32Array]:
        """(R, H + E): the trunk's units, and the signature behind them; (R, E): the signature."""
        trunk_RO = hidden_RD @ self.in_weight_LOD[layer].T
        trunk_RO += self.in_bias_LO[layer]
        units_RH = trunk_RO[:, : self.trunk_units]
        np.maximum(units_RH, 0, out=units_RH)
        return trunk_RO, trunk_RO[:, self.trunk_units :]

    def probability(self, layer: int, trunk_RO: Float32Array, memory_ARF: Float32Array) -> Float32Array:
        """(A, R, E): that the row will be routed to the expert, per lookahead."""
        num_rows, num_lookaheads = len(trunk_RO), len(self.version.lookaheads)
        out_RO = trunk_RO @ self.out_weight_LOO[layer].T
        out_RO += self.out_bias_LO[layer]
        logits_ARE = memory_ARF @ self.memory_weight_LAFE[layer]
        logits_ARE += out_RO.reshape(num_rows, num_lookaheads, -1).transpose(1, 0, 2)
        np.maximum(logits_ARE, _LOWEST_LOGIT, out=logits_ARE)
        probability_ARE: Float32Array = 1 / (1 + np.exp(-logits_ARE))
        return probability_ARE


class LearnedSession:
    """Memory of one node's requests."""

    def __init__(self, predictor: LearnedPredictor, spec: ModelSpec) -> None:
        self._predictor = predictor
        self._num_layers = spec.num_moe_layers
        self._ranking = Ranking(spec, predictor.version.version)
        self._history = RequestHistory(spec.num_moe_layers, spec.num_experts, spec.experts_per_token)
        self._lookaheads_A = np.array(predictor.version.lookaheads, np.intp)
        self._start = StepStart(0, ())
        self._is_prefill = False
        self._rows: tuple[int, ...] = ()
        self._requests: tuple[str, ...] = ()

    def adopt(self, former: PredictorSession) -> None:
        """See AdoptingSession: where requests were routed stays true; signatures are those of one training."""
        if isinstance(former, LearnedSession):
            same_routers = self._predictor.has_signatures_of(former._predictor)
            self._history.learn_requests(former._history, with_signatures=same_routers)

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession."""
        self._start = start
        self._is_prefill = any(span.is_prefill for span in start.spans)
        self._rows, self._requests = (), ()

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession.

        In a step with a prompt nearly every expert is needed, so that hints are for the next step only.
        """
        if observation.rows != self._rows:
            self._rows = observation.rows
            self._requests = requests_of_rows(self._start, observation.rows)
        for routing in observation.routings:
            self._history.learn_routing(routing.layer, self._requests, routing.topk_ids_RK)
        hidden_RD, layer = observation.hidden_RD, observation.layer
        if hidden_RD is None or not self._rows or layer >= self._num_layers:
            return ()
        trunk_RO, signature_RE = self._predictor.trunk(layer, hidden_RD)
        self._history.learn_signature(layer, self._requests, signature_RE)
        targets = [target_of(observation, lookahead, self._num_layers) for lookahead in self._lookaheads_A.tolist()]
        if self._is_prefill and all(target.step == observation.step for target in targets):
            return ()
        return self._hints(observation, trunk_RO, targets)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession."""
        self._history.forget(request_ids)

    def _hints(self, observation: Observation, trunk_RO: Float32Array, targets: list[HintTarget]) -> list[Hint]:
        last_rows = list({request_id: row for row, request_id in enumerate(self._requests)}.values())
        if len(last_rows) < len(trunk_RO):
            # What comes next is each request's last token's business.
            trunk_RO = trunk_RO[last_rows]
        layers_A = (observation.layer + self._lookaheads_A) % self._num_layers
        requests = [self._requests[row] for row in last_rows]
        memory_ARF = np.stack([self._history.features(request_id, layers_A) for request_id in requests], axis=1)
        probability_ARE = self._predictor.probability(observation.layer, trunk_RO, memory_ARF)
        hints: list[Hint] = []
        for target, probability_RE in zip(targets, probability_ARE, strict=True):
            is_next = target.step != observation.step
            if self._is_prefill and not is_next:
                continue
            num_tokens = len(self._start.spans) if is_next else observation.num_tokens
            hints.append(self._ranking.hint(observation, target, union(probability_RE, num_tokens), num_tokens))
        return hints
