"""`python -m predictor_service.evaluation TRACE...` plays recorded traces to predictors and tells how good they are.

The table on stdout (JSON with --json), errors on stderr; exit status 0, 1 after an error.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

# Before numpy is imported, as the service has it.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.table import Table

from predictor_service.evaluation.quality import Evaluation, PredictorQuality, play
from predictor_service.plugins import installed_predictors, make_predictor
from predictor_service.predictor import PredictorSource
from promoe.config import SettingUnfit
from promoe.errors import ModelMismatch, ModelNotFound, ModelUnsupported, PromoeError
from promoe.pack_manifest import PackManifest
from promoe.trace_file import TraceReader


def main(
    traces: Annotated[list[Path], typer.Argument(help="Recorded traces, hidden states included.")],
    pack: Annotated[Path, typer.Option(help="The expert pack that was served.")],
    predictor: Annotated[list[str] | None, typer.Option(help="Plug-ins; default: all that fit the model.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="A trained artifact; default: the packaged one.")] = None,
    lookahead: Annotated[int | None, typer.Option(help="In MoE layers; default: the predictor's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure predictors on recorded traces."""
    try:
        qualities = _evaluate(
            traces, predictor, PredictorSource(PackManifest.read(pack).spec, pack, artifact, lookahead)
        )
    except (PromoeError, SettingUnfit, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps([asdict(quality) for quality in qualities], indent=1))
    else:
        Console().print(_table(qualities))


def _evaluate(paths: list[Path], names: list[str] | None, source: PredictorSource) -> list[PredictorQuality]:
    readers = [TraceReader(path) for path in paths]
    for reader in readers:
        if reader.header.model.fingerprint != source.spec.fingerprint:
            raise ModelMismatch(
                f"{reader.path} is of {reader.header.model.name} (fingerprint {reader.header.model.fingerprint}), the "
                f"pack of {source.spec.name} (fingerprint {source.spec.fingerprint})."
            )
    evaluations: list[Evaluation] = []
    for name in names or [name for name in installed_predictors() if name not in ("none", "oracle")]:
        try:
            evaluations.append(Evaluation(make_predictor(name, source)))
        except (ModelNotFound, ModelUnsupported, SettingUnfit) as reason:
            if names:
                raise
            sys.stderr.write(f"Not {name}: {reason}\n")
    for reader in readers:
        play(reader, evaluations)
    return [evaluation.quality() for evaluation in evaluations]


def _table(qualities: list[PredictorQuality]) -> Table:
    table = Table("predictor", "lookahead", "recall@k", "recall@1.5k", "calibration error", "hints", "cost")
    for quality in qualities:
        for row in quality.lookaheads:
            table.add_row(
                quality.version,
                f"{row.lookahead}{' (next step)' if row.is_next_step else ''}",
                f"{row.recall:.3f}",
                f"{row.recall_wide:.3f}",
                "" if row.calibration_error is None else f"{row.calibration_error:.3f}",
                str(row.hints),
                f"{quality.median_observe_s * 1e6:.0f} µs",
            )
    return table


if __name__ == "__main__":
    typer.run(main)
