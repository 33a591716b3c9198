"""Stopping and starting again: what is finished is kept, but only if its bytes are still those."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expert_store.pack.journal import WORK_FOLDER, locked_pack_folder
from expert_store.pack.packer import pack_checkpoint
from expert_store.pack.progress import NoProgress
from expert_store.pack.verify import verify_pack
from promoe.errors import AlreadyRunning, InvalidInput, ResourceExhausted
from promoe.model_spec import Dtype
from promoe.pack_manifest import MANIFEST_FILE, PackManifest, layer_file
from tests.expert_store.pack_oracle import assert_pack_equals_checkpoint
from tests.families import save_tiny_checkpoint

KILLED_PACKING = """
import os, signal, sys
from pathlib import Path
from expert_store.pack.packer import pack_checkpoint
from expert_store.pack.progress import NoProgress

class DieAtLayer(NoProgress):
    def finish_layer(self):
        os.kill(os.getpid(), signal.SIGKILL)

pack_checkpoint(sys.argv[1], Path(sys.argv[2]), progress=DieAtLayer())
"""


class StopAtLayer(NoProgress):
    """Raises when the n-th layer is finished."""

    def __init__(self, num_layers: int, stop: BaseException) -> None:
        self._left = num_layers
        self._stop = stop

    def finish_layer(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._stop


class PhaseProgress(NoProgress):
    """Remembers how many layers each phase had."""

    def __init__(self) -> None:
        self.layers: dict[str, int] = {}

    def begin(self, title: str, total_nbytes: int, num_layers: int) -> None:
        self.layers[title] = num_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("models") / "tiny", torch.bfloat16)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PackManifest:
    return pack_checkpoint(model, tmp_path_factory.mktemp("packs") / "whole")


@pytest.fixture
def pack(model: Path, reference: PackManifest, tmp_path: Path) -> Path:
    pack_checkpoint(model, tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def half(model: Path, tmp_path: Path) -> Path:
    """A folder in which packing was stopped when two of three layers were finished."""
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(model, tmp_path / "half", progress=StopAtLayer(2, KeyboardInterrupt()))
    return tmp_path / "half"


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_after_a_kill_packing_goes_on(model: Path, reference: PackManifest, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_PACKING, str(model), str(tmp_path / "pack")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()

    said = PhaseProgress()
    manifest = pack_checkpoint(model, tmp_path / "pack", progress=said)
    assert said.layers["Checking what is already packed"] >= 1
    assert said.layers["Packing tiny"] < 3
    assert manifest == reference
    assert_pack_equals_checkpoint(tmp_path / "pack", manifest, model)
    left = {path.name for path in (tmp_path / "pack").iterdir()}
    assert left == {MANIFEST_FILE, "experts", "dense", "routers.safetensors", ".lock"}
    assert not list((tmp_path / "pack").rglob("*.tmp"))


def test_half_a_pack_is_no_pack(half: Path) -> None:
    assert not (half / MANIFEST_FILE).exists()
    assert (half / WORK_FOLDER).is_dir()


def test_finished_layers_are_not_made_again(model: Path, half: Path, reference: PackManifest) -> None:
    inode = layer_file(half, 0).stat().st_ino
    assert pack_checkpoint(model, half) == reference
    assert layer_file(half, 0).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_leftover_is_made_again(model: Path, half: Path, reference: PackManifest, damage: str) -> None:
    path = layer_file(half, 0)
    if damage == "bit":
        flip_bit(path, 100)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert pack_checkpoint(model, half) == reference
    assert verify_pack(half) == reference


def test_a_torn_journal_entry_is_no_claim(model: Path, half: Path, reference: PackManifest) -> None:
    (half / WORK_FOLDER / "layer_00000.json").write_text('{"0": "12')
    (half / WORK_FOLDER / "dense.json").write_text("[]")
    assert pack_checkpoint(model, half) == reference


def test_leftovers_of_another_model_are_thrown_away(half: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint("olmoe", tmp_path / "other", torch.bfloat16)
    manifest = pack_checkpoint(other, half)
    assert_pack_equals_checkpoint(half, manifest, other)


def test_leftovers_of_another_dtype_are_thrown_away(model: Path, half: Path) -> None:
    manifest = pack_checkpoint(model, half, dtype=Dtype.FLOAT32)
    assert_pack_equals_checkpoint(half, manifest, model, torch.float32)


def test_a_finished_pack_is_checked_and_kept(model: Path, pack: Path, reference: PackManifest) -> None:
    inodes = [layer_file(pack, layer).stat().st_ino for layer in range(3)]
    assert pack_checkpoint(model, pack) == reference
    assert [layer_file(pack, layer).stat().st_ino for layer in range(3)] == inodes


def test_a_damaged_pack_is_mended(model: Path, pack: Path, reference: PackManifest) -> None:
    flip_bit(layer_file(pack, 1), 5)
    flip_bit(pack / "dense" / "model.safetensors", -1)
    sound = layer_file(pack, 0).stat().st_ino
    assert pack_checkpoint(model, pack) == reference
    assert verify_pack(pack) == reference
    assert layer_file(pack, 0).stat().st_ino == sound


class StopWhileChecking(NoProgress):
    """Raises at the first blob that is compared."""

    def advance(self, nbytes: int) -> None:
        raise KeyboardInterrupt


def test_a_sound_pack_stays_one_when_its_check_is_stopped(model: Path, pack: Path, reference: PackManifest) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(model, pack, progress=StopWhileChecking())
    assert verify_pack(pack) == reference
    assert pack_checkpoint(model, pack) == reference
    assert not (pack / WORK_FOLDER).exists()


def test_a_pack_that_cannot_be_mended_for_want_of_room_is_not_taken_apart(
    model: Path, pack: Path, reference: PackManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(layer_file(pack, 1), 5)
    usage = shutil.disk_usage(pack)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(ResourceExhausted, match=r"0\.00 GB are free"):
            pack_checkpoint(model, pack)
    assert PackManifest.read(pack) == reference
    assert pack_checkpoint(model, pack) == reference
    assert verify_pack(pack) == reference


def test_a_pack_whose_mending_is_stopped_is_none_until_it_is_mended(
    model: Path, pack: Path, reference: PackManifest
) -> None:
    flip_bit(layer_file(pack, 1), 5)
    with pytest.raises(KeyboardInterrupt):  # the first three layers that are told of are the checked ones
        pack_checkpoint(model, pack, progress=StopAtLayer(4, KeyboardInterrupt()))
    assert not (pack / MANIFEST_FILE).exists()
    assert pack_checkpoint(model, pack) == reference
    assert verify_pack(pack) == reference


@pytest.mark.parametrize("text", ["{", '{"pack_version": 99}'])
def test_a_pack_whose_manifest_is_damaged_is_made_anew(
    model: Path, pack: Path, reference: PackManifest, text: str
) -> None:
    (pack / MANIFEST_FILE).write_text(text)
    assert pack_checkpoint(model, pack) == reference
    assert verify_pack(pack) == reference


def test_a_pack_of_another_model_is_not_touched(pack: Path, reference: PackManifest, tmp_path: Path) -> None:
    other = save_tiny_checkpoint("olmoe", tmp_path / "other", torch.bfloat16)
    with pytest.raises(InvalidInput, match="holds a pack of tiny"):
        pack_checkpoint(other, pack)
    assert verify_pack(pack) == reference


def test_two_packers_keep_out_of_each_others_way(model: Path, tmp_path: Path) -> None:
    with locked_pack_folder(tmp_path / "pack"), pytest.raises(AlreadyRunning, match="Another process is packing"):
        pack_checkpoint(model, tmp_path / "pack")
    assert pack_checkpoint(model, tmp_path / "pack").spec.num_moe_layers == 3


@contextmanager
def files_no_longer_than(nbytes: int) -> Iterator[None]:
    """Writes beyond fail as on a full disk (EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_sentence_and_packing_goes_on_later(
    model: Path, reference: PackManifest, tmp_path: Path
) -> None:
    three_blobs_nbytes = reference.spec.layout.blob_stride_nbytes * 3
    with (
        files_no_longer_than(three_blobs_nbytes),
        pytest.raises(ResourceExhausted, match="run the same command again"),
    ):
        pack_checkpoint(model, tmp_path / "pack")
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()
    assert not list((tmp_path / "pack" / "experts").glob("*.bin"))
    assert pack_checkpoint(model, tmp_path / "pack") == reference


def test_a_disk_too_small_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceExhausted, match=r"0\.00 GB are free"):
        pack_checkpoint(model, tmp_path / "pack")
    assert not (tmp_path / "pack" / "experts").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InvalidInput, match="cannot be written"):
        pack_checkpoint(model, tmp_path / "locked" / "pack")
