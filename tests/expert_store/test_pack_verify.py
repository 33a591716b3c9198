"""Checking a pack: every changed byte is found, and the text says where."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.pack.packer import pack_checkpoint
from expert_store.pack.progress import NoProgress
from expert_store.pack.verify import damaged_experts, read_manifest, verify_pack
from promoe.errors import ModelNotFound, PackDamaged
from promoe.ids import ExpertId
from promoe.pack_manifest import MANIFEST_FILE, PackManifest, layer_file
from tests.families import save_tiny_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pack_checkpoint(save_tiny_checkpoint("gpt_oss", folder / "tiny", torch.bfloat16), folder / "pack")
    return folder / "pack"


@pytest.fixture
def pack(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "pack"))


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def test_each_damaged_expert_and_file_is_named(pack: Path) -> None:
    stride = read_manifest(pack).spec.layout.blob_stride_nbytes
    flip_bit(layer_file(pack, 0), 0)
    flip_bit(layer_file(pack, 2), 7 * stride + 3)
    flip_bit(pack / "routers.safetensors", -1)
    (pack / "dense" / "tokenizer.json").write_text("{}")
    with pytest.raises(PackDamaged) as found:
        verify_pack(pack)
    for place in (
        "L0E0 in layer_00000.bin",
        "L2E7 in layer_00002.bin",
        "routers.safetensors",
        "dense/tokenizer.json",
        "Run `promoe pack` again",
    ):
        assert place in str(found.value)
    assert str(found.value).count(" in layer_") == 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_blob_is_found(sound: Path, data: st.DataObject) -> None:
    manifest = read_manifest(sound)
    layout = manifest.spec.layout
    expert = ExpertId(1, data.draw(st.integers(0, manifest.spec.num_experts - 1)))
    offset = expert.expert * layout.blob_stride_nbytes + data.draw(st.integers(0, layout.blob_nbytes - 1))
    bit = data.draw(st.integers(0, 7))
    path = layer_file(sound, 1)
    flip_bit(path, offset, bit)
    try:
        assert damaged_experts(sound, layout, {1: manifest.blob_checksums[1]}, NoProgress()) == [expert]
    finally:
        flip_bit(path, offset, bit)


@pytest.mark.parametrize("change", [-1, 1, -4096])
def test_a_file_of_another_length_is_refused_without_reading_it(pack: Path, change: int) -> None:
    path = layer_file(pack, 1)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0")
    with pytest.raises(PackDamaged, match=r"layer_00001\.bin has \d+ bytes instead of \d+"):
        read_manifest(pack)


def test_a_file_that_is_gone_is_refused(pack: Path) -> None:
    layer_file(pack, 2).unlink()
    with pytest.raises(PackDamaged, match=r"layer_00002\.bin is missing"):
        read_manifest(pack)
    layer_file(pack, 2).touch()
    (pack / "dense" / "config.json").unlink()
    with pytest.raises(PackDamaged, match="instead of"):
        verify_pack(pack)


def test_a_dense_file_that_is_gone_is_refused(pack: Path) -> None:
    (pack / "dense" / "config.json").unlink()
    with pytest.raises(PackDamaged, match=r"config\.json is missing"):
        read_manifest(pack)


def test_folders_that_are_no_packs(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="There is no folder"):
        verify_pack(tmp_path / "nowhere")
    (pack / MANIFEST_FILE).unlink()
    with pytest.raises(PackDamaged, match="not a finished pack"):
        verify_pack(pack)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pack_version": 99}'])
def test_a_manifest_that_cannot_be_read(pack: Path, text: str) -> None:
    (pack / MANIFEST_FILE).write_text(text)
    with pytest.raises(PackDamaged, match="Run `promoe pack` again"):
        read_manifest(pack)


def test_a_manifest_with_a_layer_too_few(pack: Path) -> None:
    manifest = PackManifest.read(pack)
    replace(manifest, blob_checksums=manifest.blob_checksums[:-1]).write(pack)
    with pytest.raises(PackDamaged, match="checksums per layer"):
        read_manifest(pack)


def test_a_manifest_that_was_edited_is_refused(pack: Path) -> None:
    document = json.loads((pack / MANIFEST_FILE).read_text())
    document["spec"]["experts_per_token"] += 1
    (pack / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(PackDamaged, match="changed after it was written"):
        read_manifest(pack)


def test_a_manifest_comes_back_as_it_was_written(pack: Path, tmp_path: Path) -> None:
    manifest = PackManifest.read(pack)
    (tmp_path / "other").mkdir()
    manifest.write(tmp_path / "other")
    assert PackManifest.read(tmp_path / "other") == manifest
    assert [path.name for path in (tmp_path / "other").iterdir()] == [MANIFEST_FILE]


def test_checking_needs_no_torch() -> None:
    lines = "import sys, expert_store.pack.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lines], check=False).returncode == 0
