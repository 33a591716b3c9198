"""`python -m predictor_service.show ARTIFACT` checks an artifact and prints what it says of itself."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from predictor_service.artifact import read_artifact
from promoe.errors import PromoeError


def main(
    artifact: Annotated[Path, typer.Argument(help="A trained predictor.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check an artifact and print its manifest."""
    try:
        read = read_artifact(artifact)
    except (PromoeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    manifest = {**asdict(read.manifest), "observed": read.manifest.observed.value, "bytes": read.nbytes}
    if as_json:
        typer.echo(json.dumps(manifest, indent=1))
        return
    for key, value in manifest.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, item in value.items():
                typer.echo(f"  {name}: {item:.4g}" if isinstance(item, float) else f"  {name}: {item}")
        else:
            typer.echo(f"{key}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}")


if __name__ == "__main__":
    typer.run(main)
