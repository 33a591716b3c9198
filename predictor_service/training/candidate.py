"""A candidate for serving: trained from what serves now, measured as it would be served, written if it is better."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from predictor_service.artifact import SUFFIX, Artifact, ArtifactManifest, compact, read_artifact, write_artifact
from predictor_service.predictors import learned
from predictor_service.training.fit import FitProgress
from predictor_service.training.token_blocks import BlockSource
from predictor_service.training.train import KINDS, OBSERVED_OF_KIND, Trained, Training, train
from promoe.errors import InvalidInput
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec


@dataclass(frozen=True)
class CandidateOrder:
    """What is wanted.

    Attributes:
        base: artifact of the active version; None where it has none. Another kind than can be trained counts as none.
        name, version: of the candidate.
        max_steps, max_s: see FitSettings.
        learning_rate: where training begins from `base`.
        data: what the manifest says of the documents.
    """

    base: Path | None
    name: str
    version: str
    max_steps: int
    max_s: float
    learning_rate: float
    data: dict[str, str | int | float]


def train_candidate(
    order: CandidateOrder,
    spec: ModelSpec,
    pack: Path,
    blocks_of: Callable[[ObservedKind], BlockSource],
    out: Path,
    progress: FitProgress,
) -> tuple[Path, dict[str, float]]:
    """Trains in this thread alone, and writes the artifact into `out`.

    Args:
        order: what is wanted.
        spec, pack: the model and the folder with its routers.
        blocks_of: documents with these hidden states.
        out: a folder.
        progress: is told.

    Returns:
        The artifact's path and its metrics.

    Raises:
        PromoeError: there is too little to train on, the base cannot be read, or nothing better was found.
        OSError: the artifact cannot be written.
    """
    torch.set_num_threads(1)
    parent = _parent(order.base, spec)
    training = _training(order, parent, spec)
    trained = train(training, spec, pack, blocks_of(OBSERVED_OF_KIND[training.kind]), progress, parent)
    path = out / f"{order.name}@{order.version}{SUFFIX}"
    stored = compact(trained.trainee.tensors())
    write_artifact(path, _manifest(trained, order, spec), stored)
    try:
        served = trained.as_stored(read_artifact(path))
        before = served.before
        if before is not None and not served.result.measured.loss < before.loss:
            raise InvalidInput(
                f"The candidate is no better than {served.parent} once it is stored in 4 bits (held-out loss "
                f"{served.result.measured.loss:.4f}, {served.parent}: {before.loss:.4f})."
            )
        manifest = _manifest(served, order, spec)
        write_artifact(path, manifest, stored)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path, manifest.metrics


def _parent(base: Path | None, spec: ModelSpec) -> Artifact | None:
    if base is None:
        return None
    artifact = read_artifact(base)
    if artifact.manifest.kind not in KINDS:
        return None
    artifact.manifest.check_model(spec, base)
    return artifact


def _training(order: CandidateOrder, parent: Artifact | None, spec: ModelSpec) -> Training:
    if parent is None:
        training = Training.of(learned.KIND)
        lookaheads = tuple(lookahead for lookahead in training.lookaheads if lookahead < spec.num_moe_layers)
        training = replace(training, lookaheads=lookaheads)
        learning_rate = training.fit.learning_rate
    else:
        training, learning_rate = Training.from_parent(parent.manifest), order.learning_rate
    fit = replace(training.fit, learning_rate=learning_rate, max_steps=order.max_steps, max_s=order.max_s)
    return replace(training, fit=fit)


def _manifest(trained: Trained, order: CandidateOrder, spec: ModelSpec) -> ArtifactManifest:
    manifest = trained.manifest(order.name, order.version, spec, (spec.fingerprint,))
    return replace(manifest, training=manifest.training | order.data)
