"""From recorded traces to an artifact."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from predictor_service.artifact import Artifact, ArtifactManifest
from predictor_service.predictors import learned, promoe
from predictor_service.routers import Scoring, read_routers
from predictor_service.training.fit import Fit, FitProgress, FitResult, FitSettings, Measured
from predictor_service.training.learned_nets import LearnedNets
from predictor_service.training.promoe_nets import PromoeNets
from predictor_service.training.token_batch import BlockTensors, SignatureMap
from predictor_service.training.token_blocks import BlockSource, Split, TokenBlock
from predictor_service.training.trainee import CROSS_ENTROPY, L1, Geometry, Trainee
from promoe.errors import InvalidInput, ModelUnsupported
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec

KINDS: Final = (learned.KIND, promoe.KIND)
OBSERVED_OF_KIND: Final = {learned.KIND: ObservedKind.ROUTER_INPUT, promoe.KIND: ObservedKind.LAYER_INPUT}

DEFAULT_LOOKAHEADS: Final = {learned.KIND: (1, 2, 3, 4), promoe.KIND: (2,)}
DEFAULT_UNITS: Final = {learned.KIND: 384, promoe.KIND: 1024}
OBJECTIVES_OF_KIND: Final = {learned.KIND: (CROSS_ENTROPY,), promoe.KIND: (L1, CROSS_ENTROPY)}
"""The first is the kind's own."""
_UNITS_KEY: Final = {learned.KIND: "trunk_units", promoe.KIND: "hidden_units"}
DEFAULT_FIT: Final = {
    learned.KIND: FitSettings(epochs=8, patience=2, batch_tokens=256, learning_rate=2e-3, is_annealed=True, seed=0),
    # The paper's objective and rate; it stops when it gets no better.
    promoe.KIND: FitSettings(epochs=40, patience=2, batch_tokens=256, learning_rate=1e-3, is_annealed=False, seed=0),
}


@dataclass(frozen=True)
class Training:
    """What to train.

    Attributes:
        kind: one of KINDS.
        lookaheads: in MoE layers; one for promoe.
        units: of the trunk, or of each hidden layer.
        fit: see FitSettings.
        objective: one of the kind's OBJECTIVES_OF_KIND.
    """

    kind: str
    lookaheads: tuple[int, ...]
    units: int
    fit: FitSettings
    objective: str

    @classmethod
    def of(cls, kind: str) -> "Training":
        """The kind's own settings; raises ValueError naming the allowed kinds."""
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
        objective = OBJECTIVES_OF_KIND[kind][0]
        return cls(kind, DEFAULT_LOOKAHEADS[kind], DEFAULT_UNITS[kind], DEFAULT_FIT[kind], objective)

    @classmethod
    def from_parent(cls, parent: ArtifactManifest) -> "Training":
        """What goes on where an artifact's training ended; raises InvalidInput unless it is of one of KINDS."""
        if parent.kind not in KINDS:
            raise InvalidInput(
                f"{parent.name}@{parent.version} is of the kind {parent.kind}; allowed: {', '.join(KINDS)}."
            )
        own = cls.of(parent.kind)
        units = int(parent.training.get(_UNITS_KEY[parent.kind], own.units))
        objective = str(parent.training.get("objective", own.objective))
        return replace(own, lookaheads=parent.lookaheads, units=units, objective=objective)

    def check(self, num_moe_layers: int) -> None:
        """Raises ValueError for settings that this model cannot have."""
        if not self.lookaheads or len(set(self.lookaheads)) < len(self.lookaheads):
            raise ValueError(f"lookaheads are {self.lookaheads}; give at least one, each once")
        if not all(1 <= lookahead < num_moe_layers for lookahead in self.lookaheads):
            raise ValueError(f"lookaheads are {self.lookaheads}; allowed: 1 to {num_moe_layers - 1}")
        if self.kind == promoe.KIND and len(self.lookaheads) != 1:
            raise ValueError(f"lookaheads are {self.lookaheads}; promoe is trained for one")
        if self.objective not in OBJECTIVES_OF_KIND[self.kind]:
            allowed = ", ".join(OBJECTIVES_OF_KIND[self.kind])
            raise ValueError(f"objective is {self.objective!r}; allowed for {self.kind}: {allowed}")
        if self.units < 1:
            raise ValueError(f"units is {self.units}; allowed: 1 or more")


@dataclass(frozen=True)
class Trained:
    """Networks with the weights of the best epoch, and how good they are.

    Attributes:
        training, trainee, fit, result: see there.
        parent, before: the version that it began from, and how good that is on the same documents; or none.
    """

    training: Training
    trainee: Trainee
    fit: Fit
    result: FitResult
    parent: str = ""
    before: Measured | None = None

    def as_stored(self, artifact: Artifact) -> "Trained":
        """The same, measured with the weights that its artifact stores, which has them in fewer bits."""
        self.trainee.restore(artifact)
        return replace(self, result=replace(self.result, measured=self.fit.measure()))

    def manifest(self, name: str, version: str, spec: ModelSpec, fingerprints: tuple[str, ...]) -> ArtifactManifest:
        """What the artifact says of itself; the data's description can be added to `training`."""
        kind, measured = self.training.kind, self.result.measured
        metrics = {"held_out_loss": measured.loss, "held_out_tokens": float(measured.num_tokens)}
        if self.before is not None:
            metrics["held_out_loss_of_parent"] = self.before.loss
        for lookahead, recall, wide in zip(
            self.training.lookaheads, measured.recall_A, measured.recall_wide_A, strict=True
        ):
            metrics[f"recall_at_k_lookahead_{lookahead}"] = recall
            metrics[f"recall_at_1.5k_lookahead_{lookahead}"] = wide
        return ArtifactManifest(
            kind=kind,
            name=name,
            version=version,
            fingerprints=fingerprints,
            num_moe_layers=spec.num_moe_layers,
            num_experts=spec.num_experts,
            experts_per_token=spec.experts_per_token,
            hidden_size=spec.hidden_size,
            observed=OBSERVED_OF_KIND[kind],
            features=learned.FEATURES if kind == learned.KIND else promoe.FEATURES,
            lookaheads=self.training.lookaheads,
            training={
                _UNITS_KEY[kind]: self.training.units,
                "objective": self.training.objective,
                "epochs": self.result.epochs,
                "train_tokens": self.result.num_tokens,
                "seed": self.training.fit.seed,
                "learning_rate": self.training.fit.learning_rate,
                "batch_tokens": self.training.fit.batch_tokens,
            },
            metrics=metrics,
            parent=self.parent,
        )


def train(
    training: Training,
    spec: ModelSpec,
    pack: Path,
    blocks: BlockSource,
    progress: FitProgress,
    parent: Artifact | None = None,
) -> Trained:
    """Trains on the blocks.

    Args:
        training: what to train.
        spec, pack: the model and the folder with its routers.
        blocks: recorded tokens, with the hidden states that the kind observes.
        progress: is told.
        parent: what training begins from, of the settings' kind; see `Training.from_parent`.

    Raises:
        ValueError: settings that the model cannot have.
        InvalidInput: nothing to train on or to measure on; or no epoch was better than the parent.
    """
    training.check(spec.num_moe_layers)
    torch.manual_seed(training.fit.seed)
    geometry = Geometry(spec.num_moe_layers, spec.num_experts, spec.experts_per_token, spec.hidden_size)
    trainee: Trainee
    signature: SignatureMap | None = None
    if training.kind == learned.KIND:
        first = _first_block(blocks)
        signature = _signature_map(pack, spec, first) if parent is None else _signature_of(parent, training.units)
        trainee = LearnedNets(geometry, training.lookaheads, training.units, signature, _input_scale(first, geometry))
    else:
        trainee = PromoeNets(geometry, training.lookaheads[0], training.units, training.objective)
    num_next = max(training.lookaheads) + 1

    def prepare(block: TokenBlock) -> BlockTensors:
        return BlockTensors(block, spec.num_experts, num_next, signature)

    if parent is None:
        fit = Fit(trainee, blocks, prepare, training.fit, spec.experts_per_token)
        return Trained(training, trainee, fit, fit.run(progress))
    trainee.restore(parent)
    fit = Fit(trainee, blocks, prepare, training.fit, spec.experts_per_token)
    before = fit.measure()
    result = fit.run(progress)
    name = f"{parent.manifest.name}@{parent.manifest.version}"
    if not result.measured.loss < before.loss:  # nor a loss that is no number
        raise InvalidInput(
            f"No epoch is better than {name} on held-out documents (loss {result.measured.loss:.4f}, {name}: "
            f"{before.loss:.4f}): nothing is written."
        )
    return Trained(training, trainee, fit, result, name, before)


def _first_block(blocks: BlockSource) -> TokenBlock:
    for block in blocks(Split.TRAIN):
        return block
    raise InvalidInput("There are no documents to train on: the traces are empty, or all documents are held out.")


def _input_scale(block: TokenBlock, geometry: Geometry) -> torch.Tensor:
    """(2, L, D): mean and standard deviation."""
    moments = []
    for layer, known_N in zip(range(geometry.num_moe_layers), block.known_SN, strict=False):
        if not known_N.any():
            moments.append(torch.stack([torch.zeros(geometry.hidden_size), torch.ones(geometry.hidden_size)]))
            continue
        hidden_ND = torch.from_numpy(block.hidden_SND[layer, known_N].view("int16")).view(torch.bfloat16).float()
        moments.append(torch.stack([hidden_ND.mean(dim=0), hidden_ND.std(dim=0, correction=0)]))
    return torch.stack(moments, dim=1)


def _signature_map(pack: Path, spec: ModelSpec, block: TokenBlock) -> SignatureMap | None:
    """From the pack's routers; None for families that rank experts by more than the logits."""
    try:
        routers = read_routers(pack, spec)
    except ModelUnsupported:
        return None
    if routers.scoring is not Scoring.LOGIT:
        return None
    weight_LED, bias_LE = torch.from_numpy(routers.weight_LED), torch.from_numpy(routers.bias_LE)
    centred = SignatureMap(weight_LED - weight_LED.mean(1, keepdim=True), bias_LE - bias_LE.mean(1, keepdim=True))
    sample = torch.from_numpy(block.hidden_SND[: spec.num_moe_layers, :4096].view("int16")).view(torch.bfloat16)
    known_LN = torch.from_numpy(block.known_SN[: spec.num_moe_layers, :4096])
    signature_LNE = centred.of(sample.float())
    spreads = [
        signature_LNE[layer, known_N].std() if known_N.any() else torch.ones(())
        for layer, known_N in enumerate(known_LN)
    ]
    scale_L = torch.stack(spreads).clamp(min=1e-6)
    return replace(
        centred, weight_LED=centred.weight_LED / scale_L[:, None, None], bias_LE=centred.bias_LE / scale_L[:, None]
    )


def _signature_of(parent: Artifact, units: int) -> SignatureMap | None:
    """As the parent has it, so that what is remembered of running requests means the same to both."""
    weight_LED = np.ascontiguousarray(parent.tensors["in.weight"][:, units:])
    bias_LE = np.ascontiguousarray(parent.tensors["in.bias"][:, units:])
    return SignatureMap(torch.from_numpy(weight_LED), torch.from_numpy(bias_LE)) if weight_LED.any() else None


def sentence_of(lookaheads: Iterable[int], recalls: Iterable[float]) -> str:
    """For progress displays: recall per lookahead."""
    return ", ".join(f"{recall:.3f} at {lookahead}" for lookahead, recall in zip(lookaheads, recalls, strict=True))
