"""The directory outlives the store at any instant: an entry reads as what was written, or as nothing."""

from hypothesis import given
from hypothesis import strategies as st

from expert_store.directory import ENTRY_NBYTES, Directory, DirectoryEntry

ENTRIES = st.builds(DirectoryEntry, st.booleans(), st.integers(1, 2**32 - 1), st.integers(0, 2**64 - 1))

ENTRY_BYTES = st.binary(max_size=ENTRY_NBYTES)


@given(st.dictionaries(st.integers(0, 9), ENTRIES))
def test_reads_what_was_written(entries: dict[int, DirectoryEntry]) -> None:
    directory = Directory(memoryview(bytearray(10 * ENTRY_NBYTES)))
    for index, entry in entries.items():
        directory.write(index, entry)
    assert {i: e for i in range(len(directory)) if (e := directory.read(i)) is not None} == entries


@given(ENTRIES, ENTRIES, st.integers(0, ENTRY_NBYTES))
def test_a_torn_entry_is_the_old_one_the_new_one_or_nothing(
    old: DirectoryEntry, new: DirectoryEntry, num_written: int
) -> None:
    memory, target = bytearray(ENTRY_NBYTES), bytearray(ENTRY_NBYTES)
    Directory(memoryview(memory)).write(0, old)
    Directory(memoryview(target)).write(0, new)
    memory[:num_written] = target[:num_written]
    assert Directory(memoryview(memory)).read(0) in (old, new, None)


@given(ENTRIES, st.integers(0, 19), st.integers(0, 7))
def test_a_flipped_bit_empties_the_entry(entry: DirectoryEntry, byte: int, bit: int) -> None:
    memory = bytearray(ENTRY_NBYTES)
    directory = Directory(memoryview(memory))
    directory.write(0, entry)
    memory[byte] ^= 1 << bit
    assert directory.read(0) is None


@given(ENTRIES)
def test_an_entry_is_valid_at_its_own_place_only(entry: DirectoryEntry) -> None:
    memory = bytearray(2 * ENTRY_NBYTES)
    directory = Directory(memoryview(memory))
    directory.write(0, entry)
    memory[ENTRY_NBYTES:] = memory[:ENTRY_NBYTES]
    assert directory.read(0) == entry
    assert directory.read(1) is None


@given(ENTRIES, ENTRY_BYTES)
def test_only_a_place_that_was_never_written_is_unused(entry: DirectoryEntry, torn: bytes) -> None:
    memory = bytearray(2 * ENTRY_NBYTES)
    directory = Directory(memoryview(memory))
    assert directory.is_unused(0)
    memory[: len(torn)] = torn
    assert directory.is_unused(0) == (not any(torn))
    directory.write(0, entry)
    assert not directory.is_unused(0)
    assert directory.is_unused(1)
