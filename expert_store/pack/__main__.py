"""`python -m expert_store.pack MODEL DIR` makes a pack, `--verify DIR` checks one, `MODEL --footprint` tells its sizes.

Progress and errors on stderr, the pack's folder or the footprint (JSON) on stdout; exit status 0, 1 after an error, 130
after Ctrl-C.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from expert_store.memory_budget import host_room
from expert_store.pack.progress import PackProgress
from expert_store.pack.progress_display import shown_progress
from expert_store.pack.verify import verify_pack
from promoe.errors import InvalidInput, PromoeError
from promoe.model_spec import Dtype
from promoe.pack_manifest import PackManifest

_INTERRUPTED: Final = 130


def main(
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id.")] = None,
    pack_dir: Annotated[Path | None, typer.Argument(metavar="DIR", help="Folder of the pack, new or begun.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights; by default they keep their dtype.")] = None,
    verify: Annotated[Path | None, typer.Option(metavar="DIR", help="Compare a pack with its checksums.")] = None,
    footprint: Annotated[bool, typer.Option("--footprint", help="Only say what the model will take, as JSON.")] = False,
) -> None:
    """Split a Hugging Face MoE checkpoint into an expert pack, or check one."""
    try:
        if footprint:
            typer.echo(json.dumps(_footprint(model, pack_dir, dtype, verify)))
            return
        with shown_progress() as progress:
            manifest, folder = _run(model, pack_dir, dtype, verify, progress)
    except (PromoeError, ValueError, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        again = "" if verify else " What is packed is kept: run the same command again to go on."
        _say(f"Stopped.{again}")
        raise typer.Exit(_INTERRUPTED) from None
    spec = manifest.spec
    _say(
        f"{spec.name}: {spec.num_moe_layers} MoE layers of {spec.num_experts} experts, "
        f"{spec.experts_nbytes / 1e9:.2f} GB of experts in {spec.layout.dtype.value}, fingerprint {spec.fingerprint}"
    )
    typer.echo(folder)


def _run(
    model: str | None, pack_dir: Path | None, dtype: Dtype | None, verify: Path | None, progress: PackProgress
) -> tuple[PackManifest, Path]:
    if verify is not None:
        if model is not None or dtype is not None:
            raise InvalidInput("--verify DIR takes neither a model nor a dtype.")
        return verify_pack(verify, progress), verify
    if model is None or pack_dir is None:
        raise InvalidInput("Give a model and a folder for its pack, or --verify DIR.")
    # Huge pages for the converted tensors: half of the time of conversion is page faults. Read by torch when imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Checking needs no torch; importing it takes longer than checking a small pack.
    from expert_store.pack.packer import pack_checkpoint

    return pack_checkpoint(model, pack_dir, dtype=dtype, progress=progress), pack_dir


def _footprint(model: str | None, pack_dir: Path | None, dtype: Dtype | None, verify: Path | None) -> dict[str, object]:
    if model is None or pack_dir is not None or verify is not None:
        raise InvalidInput("--footprint takes a model, and a dtype if it is to be packed in another.")
    from expert_store.pack.footprint import footprint_of

    return {"model": footprint_of(model, dtype).as_document(), "host": asdict(host_room())}


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


if __name__ == "__main__":
    typer.run(main)
