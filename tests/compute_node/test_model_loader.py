"""The dense rest of a pack becomes a model whose experts have no weights; damage is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compute_node.model_loader import load_model
from expert_store.pack.packer import pack_checkpoint
from promoe.errors import PackDamaged
from promoe.pack_manifest import DENSE_FOLDER, PackManifest
from tests.families import save_tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, pack) of a family with shared experts, dense layers and a buffer that is no parameter."""
    folder = tmp_path_factory.mktemp("packed")
    checkpoint = save_tiny_checkpoint("deepseek_v3", folder / "checkpoint", torch.bfloat16)
    pack_checkpoint(checkpoint, folder / "pack", dtype=None)
    return checkpoint, folder / "pack"


def copy_of(pack_dir: Path, target: Path) -> Path:
    """A pack that may be damaged."""
    for source in sorted(pack_dir.rglob("*")):
        if source.is_file():
            place = target / source.relative_to(pack_dir)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.read_bytes())
    return target


def test_dense_weights_are_the_checkpoints_and_experts_take_no_memory(packed: tuple[Path, Path]) -> None:
    checkpoint, pack_dir = packed
    manifest = PackManifest.read(pack_dir)
    loaded = load_model(pack_dir, manifest, CPU)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    routed = {
        f"{name}.{parameter}"
        for name in manifest.layer_modules
        for parameter, _ in loaded.model.get_submodule(name).named_parameters(recurse=False)
    }
    assert routed
    ours = dict(loaded.model.named_parameters()) | dict(loaded.model.named_buffers())
    theirs = dict(reference.named_parameters()) | dict(reference.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name in routed:
            assert ours[name].is_meta, f"{name} has no bytes"
        else:
            assert torch.equal(ours[name], tensor), name
            assert ours[name].dtype == tensor.dtype, f"{name} keeps its precision"
    assert loaded.dense_nbytes == sum(t.nbytes for name, t in ours.items() if name not in routed)
    assert not loaded.model.training
    assert [loaded.model.get_submodule(name) for name in manifest.layer_modules] == list(loaded.experts_modules)


def test_a_flipped_bit_in_a_dense_file_is_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    pack_dir = copy_of(packed[1], tmp_path / "pack")
    weights = next((pack_dir / DENSE_FOLDER).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PackDamaged, match=rf"{weights.name} is not the file that was packed"):
        load_model(pack_dir, PackManifest.read(pack_dir), CPU)


def test_a_missing_dense_file_is_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    pack_dir = copy_of(packed[1], tmp_path / "pack")
    (pack_dir / DENSE_FOLDER / "config.json").unlink()
    with pytest.raises(PackDamaged, match=r"config.json is missing"):
        load_model(pack_dir, PackManifest.read(pack_dir), CPU)
