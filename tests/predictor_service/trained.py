"""Predictors trained within seconds, for tests."""

from dataclasses import replace
from pathlib import Path

from predictor_service.artifact import write_artifact
from predictor_service.predictor import PredictorSource
from predictor_service.training.fit import Measured
from predictor_service.training.token_blocks import BlockSource
from predictor_service.training.train import Trained, Training, train
from tests.predictor_service.made_up_traces import FixedBlocks, LearnableModel, learnable_spec


class SilentProgress:
    """Remembers the epochs."""

    def __init__(self) -> None:
        self.epochs: list[Measured] = []
        self.num_tokens = 0

    def advance(self, epoch: int, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def finish_epoch(self, epoch: int, measured: Measured) -> None:
        self.epochs.append(measured)


def small_training(kind: str, **changes: object) -> Training:
    """A few seconds' worth."""
    training = Training.of(kind)
    fit = replace(training.fit, epochs=12, batch_tokens=128, learning_rate=8e-3)
    small = replace(training, lookaheads=(1, 2) if kind == "learned" else (2,), units=24, fit=fit)
    return replace(small, **changes)  # type: ignore[arg-type]


def made_up_blocks(model: LearnableModel, kind: str, documents: int = 150) -> BlockSource:
    layer_input = kind == "promoe"
    return FixedBlocks(
        train=model.block(documents, seed=1, layer_input=layer_input),
        held_out=model.block(30, seed=2, layer_input=layer_input),
    )


def train_small(kind: str, folder: Path, **changes: object) -> tuple[Trained, PredictorSource]:
    """Trained networks, and a source with their artifact and the pack."""
    model, spec = LearnableModel(), learnable_spec()
    pack = model.write_pack(folder / "pack")
    trained = train(small_training(kind, **changes), spec, pack, made_up_blocks(model, kind), SilentProgress())
    path = folder / "artifact.safetensors"
    manifest = trained.manifest(f"{kind}-test", "3", spec, (spec.fingerprint,))
    # In float32, so that tests can compare with the networks.
    write_artifact(path, manifest, trained.trainee.tensors())
    return trained, PredictorSource(spec, pack, path)
