"""The arena's header page and mapping, which both ends must agree about."""

import faulthandler
import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.arena import ARENA_KINDS, ArenaHeader, SharedMapping
from promoe.errors import InvalidInput, ResourceExhausted

U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    ArenaHeader,
    uuid=st.text(string.hexdigits, min_size=32, max_size=32),
    fingerprint=st.text(string.hexdigits, max_size=128),
    num_blobs=st.integers(0, 2**32 - 1),
    nbytes=U64,
    data_offset=U64,
    blob_stride_nbytes=U64,
)
MEMFD = ARENA_KINDS["memfd"]


@given(HEADERS, st.binary(max_size=50))
def test_a_header_reads_as_it_was_written(header: ArenaHeader, rest: bytes) -> None:
    assert ArenaHeader.decode(header.encode() + rest) == header


@given(HEADERS, st.data())
def test_a_changed_or_cut_header_is_refused(header: ArenaHeader, data: st.DataObject) -> None:
    encoded = bytearray(header.encode())
    place = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(InvalidInput):
        ArenaHeader.decode(bytes(encoded[:place]))
    encoded[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(InvalidInput):
        ArenaHeader.decode(bytes(encoded))


@given(st.binary(max_size=4096))
def test_other_memory_is_not_a_header(page: bytes) -> None:
    with pytest.raises(InvalidInput):
        ArenaHeader.decode(page)


def test_a_header_of_another_version_says_so() -> None:
    header = ArenaHeader("0" * 32, "f", 1, 2, 3, 4)
    encoded = bytearray(header.encode())
    encoded[8] += 1
    with pytest.raises(InvalidInput, match="checksum does not fit"):
        ArenaHeader.decode(bytes(encoded))


def test_a_fingerprint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="129 characters; allowed: up to 128"):
        ArenaHeader("0" * 32, "f" * 129, 1, 2, 3, 4).encode()


def test_two_mappings_share_the_memory_and_populating_changes_nothing() -> None:
    fd = MEMFD.create(3 * 4096)
    first, second = SharedMapping(fd, 3 * 4096), SharedMapping(fd, 3 * 4096)
    os.close(fd)
    first.view[4096:4100] = b"seen"
    second.populate(0, 3 * 4096)
    assert bytes(second.view[4090:4110]) == b"\0" * 6 + b"seen" + b"\0" * 10
    assert second.address % 4096 == 0
    assert first.address != second.address
    first.close()
    second.close()


def test_writes_to_a_protected_mapping_kill_only_the_writer() -> None:
    fd = MEMFD.create(4096)
    mapping = SharedMapping(fd, 4096)
    mapping.view[0] = 7
    mapping.protect_from_writes()
    assert mapping.view[0] == 7
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        mapping.view[0] = 8
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert mapping.view[0] == 7
    mapping.close()
    os.close(fd)


def test_what_the_kernel_refuses_is_an_error_with_its_words() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ResourceExhausted, match="Mapping 4096 bytes of the arena failed"):
        SharedMapping(fd, 4096)
    os.close(fd)
    with pytest.raises(ResourceExhausted, match="Making an arena of -1 bytes failed"):
        MEMFD.create(-1)


def test_only_a_sealed_memfd_of_the_size_is_one() -> None:
    fd = MEMFD.create(8192)
    MEMFD.check(fd, 8192)
    with pytest.raises(InvalidInput, match="not an arena of 4096 bytes: it has 8192"):
        MEMFD.check(fd, 4096)
    os.close(fd)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 8192)
    with pytest.raises(InvalidInput, match="could pull it away"):
        MEMFD.check(unsealed, 8192)
    os.close(unsealed)
