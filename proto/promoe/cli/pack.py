"""`promoe pack`: makes or verifies a pack by becoming the packer."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from promoe.cli.pack_cache import pack_arguments


@dataclass(frozen=True)
class PackFlags:
    """The flags of `promoe pack`."""

    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id (owner/name).")] = None
    pack_dir: Annotated[Path | None, typer.Argument(help="Folder to make.")] = None
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None
    verify: Annotated[Path | None, typer.Option(metavar="DIR", help="Check every checksum of a pack instead.")] = None


def pack(flags: PackFlags) -> None:
    """Split a Hugging Face checkpoint into an expert pack (restartable), or verify one."""
    # The packer has its own progress bar, messages and exit code: nothing may stand between it and the terminal.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "expert_store.pack", *packer_arguments(flags)])


def packer_arguments(flags: PackFlags) -> tuple[str, ...]:
    """The packer's command line.

    Raises:
        BadParameter: neither a model with a folder nor a pack to verify.
    """
    if flags.verify is not None:
        if flags.model is not None or flags.dtype is not None:
            raise typer.BadParameter("--verify takes a pack's folder and nothing else")
        return ("--verify", str(flags.verify))
    if flags.model is None or flags.pack_dir is None:
        raise typer.BadParameter("give a model and the folder to make: promoe pack MODEL DIR")
    return pack_arguments(flags.model, flags.pack_dir, flags.dtype)
