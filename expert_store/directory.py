"""The directory inside the arena: which blobs are published, in a form that outlives the store process.

Only the store writes it. Each entry carries its own checksum, so that an entry that was torn by a kill reads as empty.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final

ENTRY_NBYTES: Final = 64
_ENTRY: Final = struct.Struct("<IIQ")
_CRC: Final = struct.Struct("<I")
_PUBLISHED: Final = 0x900DB10B
_WITHDRAWN: Final = 0x0FF0B10B


@dataclass(frozen=True)
class DirectoryEntry:
    """A blob that is, or was, published.

    Attributes:
        published: False when the blob was withdrawn, so that nodes may still have to be told.
        generation: counts from 1 how often the blob was written at its place.
        checksum: xxh3-64 of the blob.
    """

    published: bool
    generation: int
    checksum: int


class Directory:
    """Entries by the blob's place in the arena's order.

    Args:
        view: `ENTRY_NBYTES` for each blob, zeroed or as an earlier store left it.
    """

    def __init__(self, view: memoryview) -> None:
        assert len(view) % ENTRY_NBYTES == 0, "the directory is a whole number of entries"
        self._view = view

    def __len__(self) -> int:
        return len(self._view) // ENTRY_NBYTES

    def read(self, index: int) -> DirectoryEntry | None:
        """The entry, or None when there is none or it was torn; see `is_unused`."""
        offset = index * ENTRY_NBYTES
        body = bytes(self._view[offset : offset + _ENTRY.size])
        mark, generation, checksum = _ENTRY.unpack(body)
        (crc,) = _CRC.unpack_from(self._view, offset + _ENTRY.size)
        if mark not in (_PUBLISHED, _WITHDRAWN) or crc != _crc(index, body):
            return None
        return DirectoryEntry(mark == _PUBLISHED, generation, checksum)

    def is_unused(self, index: int) -> bool:
        """True when nothing was ever written there: no node can be reading the blob."""
        offset = index * ENTRY_NBYTES
        return not any(self._view[offset : offset + ENTRY_NBYTES])

    def write(self, index: int, entry: DirectoryEntry) -> None:
        """Publishes (the blob's bytes must be in place already) or withdraws."""
        offset = index * ENTRY_NBYTES
        mark = _PUBLISHED if entry.published else _WITHDRAWN
        body = _ENTRY.pack(mark, entry.generation, entry.checksum)
        self._view[offset : offset + _ENTRY.size] = body
        _CRC.pack_into(self._view, offset + _ENTRY.size, _crc(index, body))


def _crc(index: int, body: bytes) -> int:
    # The index is part of it: an entry copied to another place is not valid there.
    return zlib.crc32(body, index)
