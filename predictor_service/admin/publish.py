"""`python -m predictor_service.admin.publish ARTIFACT`: puts a trained predictor into a registry."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from predictor_service.admin.in_use import versions_in_use
from predictor_service.registry import Registry
from promoe.errors import PromoeError
from promoe.pack_manifest import PackManifest


def main(
    artifact: Annotated[Path, typer.Argument(help="What `promoe predictor train` wrote.")],
    registry: Annotated[Path, typer.Option(help="Folder of published versions.")],
    pack: Annotated[Path | None, typer.Option(help="An expert pack that it must fit.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Of this name's versions, keep so many of the newest.")] = 32,
) -> None:
    """Publish a trained predictor: whole, checked, and never changed again."""
    try:
        spec = None if pack is None else PackManifest.read(pack).spec
        shelf = Registry(registry)
        entry = shelf.publish(artifact, spec)
        pruned = shelf.prune(entry.name.name, keep, versions_in_use(registry) | {entry.name})
    except (PromoeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    typer.echo(f"{entry.name} is published in {registry}.")
    for name in pruned:
        typer.echo(f"{name} was removed: the newest {keep} are kept.")


if __name__ == "__main__":
    typer.run(main)
