"""The arena: no blob overlaps another, nothing foreign is adopted, and what is adopted is what was made."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_store.arena import Arena, ArenaLayout
from expert_store.directory import DirectoryEntry
from promoe.arena import ARENA_KINDS, HEADER_NBYTES, ArenaHeader, SharedMapping
from promoe.errors import InvalidInput, ModelMismatch, PromoeError
from promoe.ids import ExpertId

LAYOUTS = st.builds(
    lambda layers, experts, pages, slack: ArenaLayout("f", layers, experts, pages * 4096 - slack, pages * 4096),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 5000),
    st.integers(0, 4095),
)
LAYOUT = ArenaLayout("0123456789abcdef", 2, 3, 5000, 8192)
ENCODED_HEADER = ArenaHeader("0" * 32, LAYOUT.fingerprint, 6, LAYOUT.nbytes, LAYOUT.data_offset, 8192).encode()


@contextmanager
def made_arena() -> Iterator[Arena]:
    arena = Arena.create(LAYOUT, "memfd")
    try:
        yield arena
    finally:
        arena.close()


@given(LAYOUTS, st.data())
def test_blobs_lie_side_by_side_on_pages_behind_the_directory(layout: ArenaLayout, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, layout.num_blobs - 1))
    expert = layout.expert_at(index)
    assert layout.index_of(expert) == index
    offset = layout.offset_of(index)
    assert offset % 4096 == 0
    assert offset >= HEADER_NBYTES + layout.num_blobs * 64
    assert offset + layout.blob_nbytes <= layout.nbytes
    if index:
        assert offset == layout.offset_of(index - 1) + layout.blob_stride_nbytes


@given(LAYOUTS, st.integers(-3, 80), st.integers(-3, 320))
def test_an_expert_that_the_model_lacks_has_no_place(layout: ArenaLayout, layer: int, expert: int) -> None:
    if layer in range(layout.num_layers) and expert in range(layout.num_experts):
        assert layout.expert_at(layout.index_of(ExpertId(layer, expert))) == ExpertId(layer, expert)
    else:
        with pytest.raises(ValueError, match=f"L{layer}E{expert} is not an expert"):
            layout.index_of(ExpertId(layer, expert))


def test_an_adopted_arena_is_the_one_that_was_made() -> None:
    with made_arena() as arena:
        with arena.blob_view(4) as blob:
            blob[:3] = b"abc"
        arena.directory.write(4, DirectoryEntry(True, 7, 99))
        adopted = Arena.adopt(os.dup(arena.fd), LAYOUT, "memfd")
        assert adopted.uuid == arena.uuid
        assert adopted.directory.read(4) == DirectoryEntry(True, 7, 99)
        assert adopted.checksum(4) == arena.checksum(4) != arena.checksum(3)
        adopted.close()


def test_an_arena_cannot_be_pulled_away_from_its_readers() -> None:
    with made_arena() as arena:
        for nbytes in (0, LAYOUT.nbytes - 4096, LAYOUT.nbytes + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fd, nbytes)


def refused_descriptors(arena: Arena) -> Iterator[tuple[str, int]]:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, LAYOUT.nbytes)
    yield "not sealed", unsealed
    yield "bytes", ARENA_KINDS["memfd"].create(LAYOUT.nbytes + 4096)
    yield "mark", ARENA_KINDS["memfd"].create(LAYOUT.nbytes)
    yield "bytes", os.open("/dev/zero", os.O_RDWR)
    read_end, write_end = os.pipe()
    os.close(write_end)
    yield "bytes", read_end


def test_what_is_not_an_arena_is_refused_and_closed() -> None:
    with made_arena() as arena:
        for sentence, fd in refused_descriptors(arena):
            with pytest.raises(InvalidInput, match=sentence):
                Arena.adopt(fd, LAYOUT, "memfd")
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


@given(st.integers(0, len(ENCODED_HEADER) - 1), st.integers(0, 7))
def test_a_damaged_header_is_refused(byte: int, bit: int) -> None:
    with made_arena() as arena:
        arena.mapping.view[byte] ^= 1 << bit
        with pytest.raises(InvalidInput):
            Arena.adopt(os.dup(arena.fd), LAYOUT, "memfd")


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (replace(LAYOUT, fingerprint="fedcba"), ModelMismatch),
        (replace(LAYOUT, num_layers=3, num_experts=2), None),
        (replace(LAYOUT, num_layers=6, num_experts=1, blob_nbytes=4999), None),
        (replace(LAYOUT, num_layers=12, blob_stride_nbytes=4096, blob_nbytes=4096), InvalidInput),
        (replace(LAYOUT, num_experts=4), InvalidInput),
    ],
)
def test_an_arena_of_another_model_is_refused(other: ArenaLayout, error: type[PromoeError] | None) -> None:
    """The fingerprint tells models apart; of the shape only what moves a blob is checked again."""
    with made_arena() as arena:
        if error is None:
            Arena.adopt(os.dup(arena.fd), other, "memfd").close()
        else:
            with pytest.raises(error):
                Arena.adopt(os.dup(arena.fd), other, "memfd")


def test_the_memory_lives_as_long_as_anybody_maps_it() -> None:
    arena = Arena.create(LAYOUT, "memfd")
    reader = SharedMapping(arena.fd, LAYOUT.nbytes)
    with arena.blob_view(0) as blob:
        blob[:] = b"x" * LAYOUT.blob_nbytes
    arena.close()
    start = LAYOUT.offset_of(0)
    assert bytes(reader.view[start : start + LAYOUT.blob_nbytes]) == b"x" * LAYOUT.blob_nbytes
    reader.close()
    reader.close()
