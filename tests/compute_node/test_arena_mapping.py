"""The mapped arena: no blob crosses a registration, nothing foreign is mapped, and the CPU cannot write into it."""

import ctypes
import faulthandler
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node import arena_mapping
from compute_node.arena_mapping import ArenaGeometry, ArenaMapping
from promoe.arena import ARENA_KINDS, ArenaHeader, SharedMapping
from promoe.errors import InvalidInput, ModelMismatch, PromoeError
from tests.node_doubles import RecordingPinning

UUID = "0123456789abcdef" * 2


def geometry_of(num_blobs: int, stride_nbytes: int) -> ArenaGeometry:
    return ArenaGeometry(UUID, "memfd", 8192 + num_blobs * stride_nbytes, 8192, stride_nbytes)


def make_arena(geometry: ArenaGeometry, fingerprint: str = "model") -> int:
    fd = ARENA_KINDS["memfd"].create(geometry.nbytes)
    store = SharedMapping(fd, geometry.nbytes)
    header = ArenaHeader(
        UUID, fingerprint, geometry.num_blobs, geometry.nbytes, geometry.data_offset, geometry.blob_stride_nbytes
    ).encode()
    store.view[: len(header)] = header
    store.close()
    return fd


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    gc.collect()  # what other tests left to the collector is not a leak of these
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@given(st.integers(1, 2000), st.integers(1, 200_000))
def test_chunks_cut_between_blobs_and_stay_in_the_drivers_comfort(num_blobs: int, stride_pages: int) -> None:
    geometry = geometry_of(num_blobs, stride_pages * 4096)
    chunk_nbytes = geometry.blobs_per_chunk * geometry.blob_stride_nbytes
    assert geometry.num_blobs == num_blobs
    assert (geometry.num_chunks - 1) * geometry.blobs_per_chunk < num_blobs
    assert geometry.num_chunks * geometry.blobs_per_chunk >= num_blobs
    assert chunk_nbytes <= 256 << 20 or geometry.blobs_per_chunk == 1
    assert chunk_nbytes + geometry.blob_stride_nbytes > 256 << 20


def test_every_blob_lies_in_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_mapping, "_CHUNK_NBYTES", 5 * 4096)
    geometry, pinning = geometry_of(11, 2 * 4096), RecordingPinning()
    mapping = ArenaMapping(make_arena(geometry), geometry, "model", pinning)
    mapping.register_chunk(2)
    assert [mapping.is_registered(chunk) for chunk in range(6)] == [False, False, True, False, False, False]
    assert mapping.registered_nbytes == 4 * 4096
    mapping.register_all()
    mapping.register_all()
    assert pinning.num_calls == geometry.num_chunks == 6
    assert [mapping.num_blobs_of(chunk) for chunk in range(6)] == [2, 2, 2, 2, 2, 1]
    for index in range(11):
        offset = geometry.data_offset + index * geometry.blob_stride_nbytes
        assert pinning.covers(mapping.address_of(offset), geometry.blob_stride_nbytes)
        assert mapping.is_registered(mapping.chunk_of(offset))
    assert mapping.registered_nbytes == geometry.nbytes - geometry.data_offset
    mapping.close()
    assert pinning.registered == {}
    assert pinning.num_drains == 1


def test_what_the_store_writes_is_seen_and_this_process_cannot_write() -> None:
    geometry = geometry_of(2, 4096)
    fd = make_arena(geometry)
    store = SharedMapping(fd, geometry.nbytes)
    mapping = ArenaMapping(os.dup(fd), geometry, "model", RecordingPinning())
    mapping.register_all()
    store.view[8192:8196] = b"blob"
    address = mapping.address_of(8192)
    assert ctypes.string_at(address, 4) == b"blob"
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.memset(address, 0, 4)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert bytes(store.view[8192:8196]) == b"blob"
    mapping.close()
    store.close()
    os.close(fd)


GEOMETRY = geometry_of(2, 4096)


@pytest.mark.parametrize(
    ("said", "fingerprint", "error", "sentence"),
    [
        (replace(GEOMETRY, kind="vmm"), "model", InvalidInput, "of kind 'vmm'; this node maps: memfd"),
        (replace(GEOMETRY, nbytes=8192 + 3 * 4096), "model", InvalidInput, "not an arena of"),
        (replace(GEOMETRY, uuid="f" * 32), "model", InvalidInput, "The arena's header says"),
        (replace(GEOMETRY, data_offset=4096), "model", InvalidInput, "The arena's header says"),
        (replace(GEOMETRY, blob_stride_nbytes=8192), "model", InvalidInput, "The arena's header says"),
        (GEOMETRY, "other", ModelMismatch, "fingerprint other, but the arena it was given holds model"),
    ],
)
def test_another_arena_than_the_store_described_is_refused(
    said: ArenaGeometry, fingerprint: str, error: type[PromoeError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        ArenaMapping(make_arena(GEOMETRY), said, fingerprint, RecordingPinning())


def test_memory_that_could_shrink_is_refused() -> None:
    geometry = geometry_of(2, 4096)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, geometry.nbytes)
    with pytest.raises(InvalidInput, match="not sealed"):
        ArenaMapping(fd, geometry, "model", RecordingPinning())
