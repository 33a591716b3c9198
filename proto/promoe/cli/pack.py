"""`promoe pack`: makes or verifies a pack by becoming the packer; the demo model is built first."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from promoe.cli.pack_cache import DEMO_MODEL, pack_arguments, plan_demo_checkpoint
from promoe.cli.stop_signals import StopSignals
from promoe.cli.tool_run import run_step

_INTERRUPTED: Final = 130


@dataclass(frozen=True)
class PackFlags:
    """The flags of `promoe pack`."""

    model: Annotated[str | None, typer.Argument(help="`demo`, a checkpoint folder, or a hub id (owner/name).")] = None
    pack_dir: Annotated[Path | None, typer.Argument(help="Folder to make.")] = None
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None
    verify: Annotated[Path | None, typer.Option(metavar="DIR", help="Check every checksum of a pack instead.")] = None
    demo_wheel: Annotated[Path | None, typer.Option(help="The demo model's base wheel, if it is already here.")] = None


def pack(flags: PackFlags) -> None:
    """Split a Hugging Face checkpoint into an expert pack (restartable), or verify one."""
    arguments = packer_arguments(flags)
    if flags.model == DEMO_MODEL:
        arguments = (str(_built_demo(flags.demo_wheel)), *arguments[1:])
    # The packer has its own progress bar, messages and exit code: nothing may stand between it and the terminal.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "expert_store.pack", *arguments])


def _built_demo(wheel: Path | None) -> Path:
    checkpoint, build = plan_demo_checkpoint(wheel)
    with StopSignals() as stop:
        if not run_step(build, stop):
            raise typer.Exit(_INTERRUPTED)
    return checkpoint


def packer_arguments(flags: PackFlags) -> tuple[str, ...]:
    """The packer's command line.

    Raises:
        BadParameter: neither a model with a folder nor a pack to verify, or a demo wheel for neither.
    """
    if flags.demo_wheel is not None and flags.model != DEMO_MODEL:
        raise typer.BadParameter(f"--demo-wheel is for the model `{DEMO_MODEL}` only")
    if flags.verify is not None:
        if flags.model is not None or flags.dtype is not None:
            raise typer.BadParameter("--verify takes a pack's folder and nothing else")
        return ("--verify", str(flags.verify))
    if flags.model is None or flags.pack_dir is None:
        raise typer.BadParameter("give a model and the folder to make: promoe pack MODEL DIR")
    return pack_arguments(flags.model, flags.pack_dir, flags.dtype)
