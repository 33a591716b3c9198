"""`python -m predictor_service.hints TRACE --pack DIR --predictor NAME --out FILE` writes the trace anew with the hints
that a predictor would have given, in place of those that were recorded: what a what-if replay takes.
Hints stand where they could have been noticed if predicting took no time.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# Before numpy is imported, as the service has it.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

import typer

from predictor_service.plugins import make_predictor
from predictor_service.predictor import Predictor, PredictorSource
from predictor_service.trace_hints import with_hints
from promoe.config import SettingUnfit
from promoe.errors import InvalidInput, ModelMismatch, PromoeError
from promoe.pack_manifest import PackManifest
from promoe.trace_events import HintEvent, TraceEvent
from promoe.trace_file import TraceReader, TraceWriter


def main(
    trace: Annotated[Path, typer.Argument(help="A recorded trace, hidden states included.")],
    pack: Annotated[Path, typer.Option(help="The expert pack that was served.")],
    predictor: Annotated[str, typer.Option(help="The plug-in.")],
    out: Annotated[Path, typer.Option(help="The trace to write.")],
    artifact: Annotated[Path | None, typer.Option(help="A trained artifact; default: the packaged one.")] = None,
    lookahead: Annotated[int | None, typer.Option(help="In MoE layers; default: the predictor's own.")] = None,
) -> None:
    """Write a trace with the hints of a predictor."""
    try:
        num_hints = _write(
            trace, out, predictor, PredictorSource(PackManifest.read(pack).spec, pack, artifact, lookahead)
        )
    except (PromoeError, SettingUnfit, ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    sys.stderr.write(f"{num_hints} hints\n")
    typer.echo(out)


def _write(path: Path, out: Path, name: str, source: PredictorSource) -> int:
    reader = TraceReader(path)
    if out.exists() and out.samefile(path):
        raise InvalidInput(f"{out} is the trace itself; name another file.")
    if reader.header.model.fingerprint != source.spec.fingerprint:
        raise ModelMismatch(
            f"{path} is of fingerprint {reader.header.model.fingerprint}, the pack of {source.spec.fingerprint}."
        )
    num_hints = 0
    with TraceWriter(out, reader.header) as writer:
        writer.dropped_steps = reader.summary.dropped_steps
        for event in _events(reader, make_predictor(name, source)):
            num_hints += isinstance(event, HintEvent)
            writer.append(event)
    return num_hints


def _events(reader: TraceReader, predictor: Predictor) -> Iterator[TraceEvent]:
    session = predictor.open_session()
    for events in reader.steps():
        yield from with_hints(events, session, predictor.version, reader.header.model.num_moe_layers)


if __name__ == "__main__":
    typer.run(main)
