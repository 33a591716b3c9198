"""What is read is what was packed, or the error names the file and the expert."""

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_store.arena import ArenaLayout
from expert_store.blob_reader import check_sizes, reading_groups
from promoe.errors import PackDamaged
from promoe.ids import ExpertId
from promoe.pack_manifest import layer_file
from tests.expert_store.arenas import pack_and_arena
from tests.packs import flip_bit, write_synthetic_pack

LAYOUTS = st.builds(
    lambda layers, experts, pages: ArenaLayout("f", layers, experts, pages * 4096, pages * 4096),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1, 100, 2000, 4096, 4097, 90_000]),
)


@given(LAYOUTS, st.data())
def test_groups_cover_every_place_once_and_stay_in_one_file(layout: ArenaLayout, data: st.DataObject) -> None:
    indices = sorted(data.draw(st.sets(st.integers(0, layout.num_blobs - 1))))
    groups = list(reading_groups(layout, indices))
    assert [index for group in groups for index in group] == indices
    for group in groups:
        assert group == list(range(group[0], group[0] + len(group)))
        assert len({layout.expert_at(index).layer for index in group}) == 1
        assert len(group) == 1 or len(group) * layout.blob_stride_nbytes <= 16 << 20


def test_reads_runs_and_single_blobs_into_their_places(tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        for group in ([1, 2, 3], [0], [4, 5, 6, 7]):
            made.reader.load(group)
        assert all(made.holds(index) for index in range(8))


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def open_without_direct(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real_open(path, flags, mode)

    with pack_and_arena(tmp_path) as made:
        monkeypatch.setattr(os, "open", open_without_direct)
        for group in ([0, 1, 2, 3], [4, 5, 6, 7]):
            made.reader.load(group)
        assert all(made.holds(index) for index in range(8))
        assert not made.reader.uses_direct_io
    assert caplog.text.count("refuses O_DIRECT") == 1


def test_a_file_that_opens_for_direct_reads_and_refuses_them_is_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_preadv = os.preadv

    def preadv_without_direct(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, buffers, offset)

    with pack_and_arena(tmp_path) as made:
        monkeypatch.setattr(os, "preadv", preadv_without_direct)
        made.reader.load([0, 1])
        assert made.holds(0)
        assert made.holds(1)
    assert caplog.text.count("refuses O_DIRECT") == 1


def test_a_flipped_bit_names_file_and_expert(tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        flip_bit(made.pack_dir, ExpertId(1, 2), made.manifest)
        made.reader.load([0, 1, 2, 3])
        with pytest.raises(PackDamaged, match=r"layer_00001\.bin: the blob of L1E2 is damaged"):
            made.reader.load([4, 5, 6, 7])


def test_a_blob_that_reads_well_the_second_time_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pack_and_arena(tmp_path) as made:
        flip_bit(made.pack_dir, ExpertId(0, 3), made.manifest)

        class Repair(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                flip_bit(made.pack_dir, ExpertId(0, 3), made.manifest)

        reader_log = logging.getLogger("expert_store.blob_reader")
        monkeypatch.setattr(reader_log, "handlers", [Repair()])
        made.reader.load([0, 1, 2, 3])
        assert all(made.holds(index) for index in range(4))
    assert "L0E3 did not verify; reading it once more" in caplog.text


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def truncate_inside_a_page(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4097)


def make_unreadable_by_the_disk(path: Path) -> None:
    """Reading a process's unmapped memory is EIO, as a dying disk's answer."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "ends before the blob of L1E3"),
        (truncate_inside_a_page, "ends before the blob of L1E3"),
        (make_unreadable_by_the_disk, r"the blob of L1E0 cannot be read \(Input/output error\)"),
        (make_directory, r"cannot be (read|opened)"),
        (Path.unlink, r"cannot be opened \(No such file"),
    ],
)
def test_a_disk_error_names_the_file(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    with pack_and_arena(tmp_path) as made:
        damage(layer_file(made.pack_dir, 1))
        with pytest.raises(PackDamaged, match=sentence) as caught:
            made.reader.load([4, 5, 6, 7])
        assert "layer_00001.bin" in str(caught.value)


@pytest.mark.parametrize("change", [-1, 1, 4096, -4096])
def test_sizes_are_checked_before_anything_is_read(change: int, tmp_path: Path) -> None:
    manifest = write_synthetic_pack(tmp_path / "pack")
    layout = ArenaLayout.of(manifest.spec)
    check_sizes(tmp_path / "pack", layout)
    path = layer_file(tmp_path / "pack", 1)
    wanted = path.stat().st_size
    os.truncate(path, wanted + change)
    with pytest.raises(PackDamaged, match=f"layer_00001.bin has {wanted + change} bytes .* implies {wanted}"):
        check_sizes(tmp_path / "pack", layout)
    path.unlink()
    with pytest.raises(PackDamaged, match=r"layer_00001\.bin cannot be read \(No such file"):
        check_sizes(tmp_path / "pack", layout)
