"""The expert store's arena in this process: mapped, registered with the device in chunks, then write-protected.

Knows no sockets. Chunks are cut at multiples of the blob stride, because a copy must not cross two registrations.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from compute_node.device.seam import HostPinning
from promoe.arena import ARENA_KINDS, HEADER_NBYTES, ArenaHeader, SharedMapping
from promoe.errors import InvalidInput, ModelMismatch

# Below 512 MiB the driver's page list stays small enough not to stall the whole node (NVIDIA open-gpu-kernel-modules
# issue 1383); the pause lets other processes at the driver's lock between two chunks.
_CHUNK_NBYTES: Final = 256 << 20
_PAUSE_S: Final = 0.002
_POPULATE_THREADS: Final = 4
_POPULATE_NBYTES: Final = 32 << 20


@dataclass(frozen=True)
class ArenaGeometry:
    """What the store says about its arena; see `ArenaInfo` in expert_store.proto."""

    uuid: str
    kind: str
    nbytes: int
    data_offset: int
    blob_stride_nbytes: int

    @property
    def num_blobs(self) -> int:
        """Experts over all MoE layers."""
        return (self.nbytes - self.data_offset) // self.blob_stride_nbytes

    @property
    def blobs_per_chunk(self) -> int:
        """Whole blobs that are registered together."""
        return max(1, _CHUNK_NBYTES // self.blob_stride_nbytes)

    @property
    def num_chunks(self) -> int:
        """Registrations of the whole arena."""
        return -(-self.num_blobs // self.blobs_per_chunk)


class ArenaMapping:
    """One arena, mapped. Owns `fd` from here and keeps it, to hand it back to a store that was restarted.

    Args:
        fd: the descriptor that came through the side-channel.
        geometry: what the store said; checked against the memory.
        fingerprint: of the model the arena must hold.
        pinning: makes the chunks copyable.

    Raises:
        InvalidInput: the memory is not the arena that the store described, or could shrink under its readers.
        ModelMismatch: it holds another model.
        ResourceExhausted: the kernel refused the mapping.
    """

    def __init__(self, fd: int, geometry: ArenaGeometry, fingerprint: str, pinning: HostPinning) -> None:
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            if geometry.kind not in ARENA_KINDS:
                raise InvalidInput(
                    f"The store's arena is of kind {geometry.kind!r}; this node maps: {', '.join(ARENA_KINDS)}."
                )
            ARENA_KINDS[geometry.kind].check(fd, geometry.nbytes)
            self._mapping = SharedMapping(fd, geometry.nbytes)
            undo.callback(self._mapping.close)
            _check_header(ArenaHeader.decode(bytes(self._mapping.view[:HEADER_NBYTES])), geometry, fingerprint)
            undo.pop_all()
        self.fd = fd
        self.geometry = geometry
        self._pinning = pinning
        self._registered: dict[int, int] = {}
        self._protected = False

    @property
    def registered_nbytes(self) -> int:
        """Bytes that the device can copy from."""
        return sum(self._registered.values())

    def address_of(self, offset: int) -> int:
        """Where the blob at this offset of the arena lies in this process."""
        return self._mapping.address + offset

    def chunk_of(self, offset: int) -> int:
        """The chunk that the blob at this offset belongs to; raises InvalidInput where no blob can be."""
        geometry = self.geometry
        place, rest = divmod(offset - geometry.data_offset, geometry.blob_stride_nbytes)
        if rest or not 0 <= place < geometry.num_blobs:
            raise InvalidInput(f"The expert store speaks of a blob at byte {offset}; its arena has no place there.")
        return place // geometry.blobs_per_chunk

    def num_blobs_of(self, chunk: int) -> int:
        """Blobs in a chunk; the last one may have fewer."""
        return min(self.geometry.blobs_per_chunk, self.geometry.num_blobs - chunk * self.geometry.blobs_per_chunk)

    def is_registered(self, chunk: int) -> bool:
        """True when the device can copy from the chunk."""
        return self._chunk_offset(chunk) in self._registered

    def register_chunk(self, chunk: int) -> None:
        """Populates and registers one chunk; a registered one is left alone.

        Raises:
            ResourceExhausted: there is no memory for the page tables.
        """
        offset = self._chunk_offset(chunk)
        if offset in self._registered:
            return
        assert not self._protected, "chunks are registered before the mapping is write-protected"
        nbytes = self.num_blobs_of(chunk) * self.geometry.blob_stride_nbytes
        self._populate(offset, nbytes)
        self._pinning.register(self.address_of(offset), nbytes)
        self._registered[offset] = nbytes
        time.sleep(_PAUSE_S)

    def register_all(self) -> None:
        """Registers what is not registered yet, then makes the mapping read-only for this process's CPU."""
        for chunk in range(self.geometry.num_chunks):
            self.register_chunk(chunk)
        if not self._protected:
            # The driver pins for writing, so protection can only come afterwards; pins and copies stay valid.
            self._mapping.protect_from_writes()
            self._protected = True

    def close(self) -> None:
        """Waits for copies under way, then unregisters, unmaps and closes. No address may be used any more."""
        self._pinning.drain()
        for offset in self._registered:
            self._pinning.unregister(self.address_of(offset))
        self._registered.clear()
        self._mapping.close()
        os.close(self.fd)

    def _chunk_offset(self, chunk: int) -> int:
        geometry = self.geometry
        return geometry.data_offset + chunk * geometry.blobs_per_chunk * geometry.blob_stride_nbytes

    def _populate(self, offset: int, nbytes: int) -> None:
        """Page-table entries ahead of the driver, in threads: registering is then twice as quick under its lock."""
        pieces = range(offset, offset + nbytes, _POPULATE_NBYTES)
        with ThreadPoolExecutor(_POPULATE_THREADS) as threads:
            for _ in threads.map(
                lambda start: self._mapping.populate(start, min(_POPULATE_NBYTES, offset + nbytes - start)), pieces
            ):
                pass


def _check_header(header: ArenaHeader, geometry: ArenaGeometry, fingerprint: str) -> None:
    if header.fingerprint != fingerprint:
        raise ModelMismatch(
            f"This process was started for the model with fingerprint {fingerprint}, but the arena it was given holds "
            f"{header.fingerprint}."
        )
    found = (header.uuid, header.nbytes, header.data_offset, header.blob_stride_nbytes)
    wanted = (geometry.uuid, geometry.nbytes, geometry.data_offset, geometry.blob_stride_nbytes)
    if found != wanted:
        raise InvalidInput(f"The arena's header says {found} (uuid, bytes, data offset, stride), the store {wanted}.")
