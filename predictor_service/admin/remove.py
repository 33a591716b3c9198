"""`python -m predictor_service.admin.remove VERSION`: takes a published version out of a registry."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from predictor_service.admin.in_use import versions_in_use
from predictor_service.registry import Registry, VersionName
from promoe.errors import InvalidInput, PromoeError


def main(
    version: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    registry: Annotated[Path, typer.Option(help="Folder of published versions.")],
    force: Annotated[bool, typer.Option("--force", help="Also one that a service would go on with.")] = False,
) -> None:
    """Delete a published version."""
    try:
        name = VersionName.parse(version)
        shelf = Registry(registry)
        shelf.path_of(name)
        if not force and name in versions_in_use(registry):
            raise InvalidInput(
                f"{name} is in use by a service of {registry}: it is active, was active before, or is what was tried "
                "last. `promoe predictor list` says which; activate others first, or say --force."
            )
        shelf.remove(name)
    except (PromoeError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from error
    typer.echo(f"{name} is removed from {registry}.")


if __name__ == "__main__":
    typer.run(main)
