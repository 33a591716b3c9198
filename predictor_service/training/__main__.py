"""`python -m predictor_service.training TRACE... --pack DIR --out FILE` trains a predictor from recorded traces.

Progress and errors on stderr, the artifact's path on stdout. Exit status 0, 1 after an error, 2 for wrong usage, 130
after Ctrl-C, when the best of the finished epochs is kept, or if there is none nothing is written.
"""

import argparse
import ctypes
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from predictor_service.artifact import Artifact, ArtifactManifest, compact, read_artifact, write_artifact
from predictor_service.predictors import learned
from predictor_service.training.progress_display import shown_progress
from predictor_service.training.token_blocks import TraceBlocks
from predictor_service.training.train import DEFAULT_FIT, KINDS, OBSERVED_OF_KIND, Trained, Training, train
from predictor_service.training.trainee import CROSS_ENTROPY, L1
from promoe.errors import ModelMismatch, PromoeError
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import PackManifest

_INTERRUPTED: Final = 130

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_MAX: Final = -4
_MOST_INT: Final = 2**31 - 1
_TOP_PAD_NBYTES: Final = 256 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(argv)
    _keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        parent = None if options.parent is None else read_artifact(options.parent)
        training = _training(options, parent)
        spec = PackManifest.read(options.pack).spec
        blocks = TraceBlocks(options.traces, OBSERVED_OF_KIND[training.kind], options.held_out, options.seed)
        _check_model(blocks, spec)
        if parent is not None:
            parent.manifest.check_model(spec, parent.path)
        with shown_progress(training.lookaheads) as progress:
            trained = train(training, spec, options.pack, blocks, progress, parent)
        name = options.name or (parent.manifest.name if parent else f"{training.kind}-{spec.name}")
        manifest = trained.manifest(name, options.version, spec, (spec.fingerprint, *options.also_fits))
        described = _with_data(manifest, options.traces, options.held_out)
        write_artifact(options.out, described, compact(trained.trainee.tensors()))
    except (PromoeError, ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("Stopped before the first epoch was measured: nothing is written.")
        return _INTERRUPTED
    return _tell(trained, options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="promoe predictor train", description="Train a predictor from traces.")
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="recorded with hidden states")
    parser.add_argument("--pack", type=Path, required=True, metavar="DIR", help="the expert pack that was served")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the artifact to write")
    parser.add_argument("--kind", choices=KINDS, help=f"default: {learned.KIND}, or that of --from")
    parser.add_argument(
        "--from",
        dest="parent",
        type=Path,
        metavar="FILE",
        help="an artifact to begin from; its kind, lookaheads, units and objective are kept",
    )
    parser.add_argument(
        "--lookahead", type=int, action="append", metavar="L", help="in MoE layers; can be given several times"
    )
    parser.add_argument("--objective", choices=(L1, CROSS_ENTROPY), help="default: the kind's, which for promoe is l1")
    parser.add_argument("--units", type=int, help="width of the networks; default: the kind's")
    defaults = ", ".join(f"{fit.epochs} for {kind}" for kind, fit in DEFAULT_FIT.items())
    parser.add_argument("--epochs", type=int, help=f"passes over the traces at most; default: {defaults}")
    parser.add_argument(
        "--held-out",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="of the documents, to measure on and not to train on; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and split; default: %(default)s")
    parser.add_argument("--name", help="of the version NAME@VERSION; default: kind and model")
    parser.add_argument("--version", default="1", help="of the version NAME@VERSION; default: %(default)s")
    parser.add_argument(
        "--also-fits",
        action="append",
        default=[],
        metavar="FINGERPRINT",
        help="a pack of the same weights in another dtype; can be given several times",
    )
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    return parser


def _keep_freed_memory() -> None:
    """Tells glibc to use freed memory again: a step's tensors are large, and fetching them anew as zeroed pages every
    time took more than half of the time of training. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST_INT)
        mallopt(_M_TOP_PAD, _TOP_PAD_NBYTES)


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def _tell(trained: Trained, out: Path) -> int:
    result = trained.result
    if result.was_interrupted:
        _say(f"Stopped: the best of {result.epochs} epochs is kept.")
    _say(f"{out}: {out.stat().st_size / 1e6:.2f} MB, trained on {result.num_tokens} tokens")
    sys.stdout.write(f"{out}\n")
    return _INTERRUPTED if result.was_interrupted else 0


def _training(options: argparse.Namespace, parent: Artifact | None) -> Training:
    if parent is not None:
        return _training_from(parent, options)
    training = Training.of(options.kind or learned.KIND)
    fit = replace(training.fit, seed=options.seed, epochs=options.epochs or training.fit.epochs)
    lookaheads = tuple(options.lookahead) if options.lookahead else training.lookaheads
    return replace(
        training,
        lookaheads=lookaheads,
        units=options.units or training.units,
        fit=fit,
        objective=options.objective or training.objective,
    )


def _training_from(parent: Artifact, options: argparse.Namespace) -> Training:
    training = Training.from_parent(parent.manifest)
    for name, asked, kept in (
        ("--kind", options.kind, training.kind),
        ("--lookahead", tuple(options.lookahead or ()), training.lookaheads),
        ("--units", options.units, training.units),
        ("--objective", options.objective, training.objective),
    ):
        if asked and asked != kept:
            raise ValueError(f"{name} is {asked}, and {options.parent} has {kept}: with --from it is kept")
    if options.name in (None, parent.manifest.name) and options.version == parent.manifest.version:
        raise ValueError(f"--version is {options.version}, which {options.parent} is already; give another")
    fit = replace(training.fit, seed=options.seed, epochs=options.epochs or training.fit.epochs)
    return replace(training, fit=fit)


def _check_model(blocks: TraceBlocks, spec: ModelSpec) -> None:
    model = blocks.model
    if model.fingerprint != spec.fingerprint:
        raise ModelMismatch(
            f"The traces are of {model.name} (fingerprint {model.fingerprint}), the pack of {spec.name} (fingerprint "
            f"{spec.fingerprint})."
        )


def _with_data(manifest: ArtifactManifest, traces: Sequence[Path], held_out: float) -> ArtifactManifest:
    data: dict[str, str | int | float] = {
        "traces": ", ".join(path.name for path in traces),
        "held_out_share": held_out,
    }
    return replace(manifest, training=manifest.training | data)


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


if __name__ == "__main__":
    sys.exit(main())
