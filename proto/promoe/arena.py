"""The shared arena as both ends see it: its kinds, its header page, and how it is mapped.

    0              header page: this module
    4096           directory of the blobs: the store's own
    data_offset    blobs, `blob_stride_nbytes` apart

Mapping is always MAP_SHARED: a private mapping "works" too, and silently makes a second copy when it is registered.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from promoe.errors import InvalidInput, ResourceExhausted

HEADER_NBYTES: Final = 4096
_MAGIC: Final = b"PROMOE-A"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sII32s128sQQQ")
_CRC: Final = struct.Struct("<I")
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

# Linux 5.14; not in every Python's mmap module.
_MADV_POPULATE_WRITE: Final = 23
_MADV_HUGEPAGE: Final = 14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class ArenaHeader:
    """What an arena holds and how; written once, when the arena is made.

    Attributes:
        uuid: 32 hexadecimal digits; an arena keeps it when a restarted store adopts it.
        fingerprint: of the model, at most 128 ASCII characters.
        num_blobs: experts over all MoE layers.
        nbytes: size of the whole arena.
        data_offset: where the first blob starts.
        blob_stride_nbytes: from one blob to the next, a multiple of 4 KiB.
    """

    uuid: str
    fingerprint: str
    num_blobs: int
    nbytes: int
    data_offset: int
    blob_stride_nbytes: int

    def encode(self) -> bytes:
        """The header page's first bytes, with their checksum."""
        fingerprint = self.fingerprint.encode("ascii")
        if len(fingerprint) > 128:
            raise ValueError(f"the model's fingerprint has {len(fingerprint)} characters; allowed: up to 128")
        body = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.num_blobs,
            self.uuid.encode("ascii"),
            fingerprint,
            self.nbytes,
            self.data_offset,
            self.blob_stride_nbytes,
        )
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, page: bytes) -> "ArenaHeader":
        """Raises InvalidInput when the page is not the header of an arena that this version reads."""
        body = page[: _HEADER.size]
        if len(page) < _HEADER.size + _CRC.size or body[: len(_MAGIC)] != _MAGIC:
            raise InvalidInput("The memory is not an arena: its first page lacks the mark of one.")
        (crc,) = _CRC.unpack_from(page, _HEADER.size)
        if crc != zlib.crc32(body):
            raise InvalidInput("The arena's header page is damaged: its checksum does not fit.")
        _, version, num_blobs, uuid, fingerprint, nbytes, data_offset, stride = _HEADER.unpack(body)
        if version != _VERSION:
            raise InvalidInput(f"The arena is of version {version}; this process reads {_VERSION}.")
        text = fingerprint.rstrip(b"\0").decode("ascii")
        return cls(uuid.decode("ascii"), text, num_blobs, nbytes, data_offset, stride)


class SharedMapping:
    """An arena mapped into this process, with a plain address. The mapping outlives the descriptor.

    Raises:
        ResourceExhausted: the kernel refused the mapping.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            raise ResourceExhausted(f"Mapping {nbytes} bytes of the arena failed: {os.strerror(ctypes.get_errno())}.")
        self.address: int = address
        self.nbytes = nbytes
        self._view: memoryview | None = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        # Only a wish: kernels with `shmem_enabled=never` answer EINVAL, and 4 KiB pages do as well.
        _libc.madvise(address, nbytes, _MADV_HUGEPAGE)

    @property
    def view(self) -> memoryview:
        """The bytes; slices of it must be released before `close`."""
        assert self._view is not None, "a closed mapping has no bytes"
        return self._view

    def populate(self, offset: int, nbytes: int) -> None:
        """Gives the range pages and page-table entries, without changing a byte; both ends page-aligned.

        Raises:
            ResourceExhausted: there is no memory for it.
        """
        if _libc.madvise(self.address + offset, nbytes, _MADV_POPULATE_WRITE) != 0:
            error = ctypes.get_errno()
            # A kernel before 5.14 does not know the advice; the pages then come one by one as they are touched.
            if error != errno.EINVAL:
                raise ResourceExhausted(f"No memory for {nbytes} bytes of the arena: {os.strerror(error)}.")

    def protect_from_writes(self) -> None:
        """From now on a store by this process's CPU into the arena faults; registrations and copies stay valid."""
        if _libc.mprotect(self.address, self.nbytes, mmap.PROT_READ) != 0:
            raise ResourceExhausted(f"Protecting the arena failed: {os.strerror(ctypes.get_errno())}.")

    def close(self) -> None:
        """Unmaps; the address must not be used any more. Closing twice is allowed."""
        if self._view is None:
            return
        self._view.release()
        self._view = None
        _libc.munmap(self.address, self.nbytes)


@dataclass(frozen=True)
class ArenaKind:
    """How one kind of arena memory is made and recognised.

    Attributes:
        create: bytes -> file descriptor; raises ResourceExhausted.
        check: (file descriptor, bytes) -> None; raises InvalidInput when it could shrink under its readers.
    """

    create: Callable[[int], int]
    check: Callable[[int, int], None]


def _create_memfd(nbytes: int) -> int:
    fd = os.memfd_create("promoe-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise ResourceExhausted(f"Making an arena of {nbytes} bytes failed: {error.strerror}.") from error
    return fd


def _check_memfd(fd: int, nbytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
        raise InvalidInput(f"The descriptor is not an arena of {nbytes} bytes: it has {status.st_size}.")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise InvalidInput(f"The descriptor is not a memfd ({error.strerror}).") from error
    if seals & _SEALS != _SEALS:
        raise InvalidInput("The arena is not sealed against shrinking and growing, so its owner could pull it away.")


ARENA_KINDS: Final = {"memfd": ArenaKind(create=_create_memfd, check=_check_memfd)}
"""Kind (as it stands in `ArenaInfo.kind`) -> how to make and check it."""
