"""The arena in the store: where each blob lies, the mapping, and the directory that survives the store.

Knows nothing of nodes and leases, nor where blobs come from.
"""

import os
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import xxhash

from expert_store.directory import ENTRY_NBYTES, Directory
from promoe.arena import ARENA_KINDS, HEADER_NBYTES, ArenaHeader, SharedMapping
from promoe.errors import InvalidInput, ModelMismatch
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec, align_up

# Blobs start on a huge page's border, so that the kernel can use huge pages where the host allows them.
_DATA_ALIGNMENT_NBYTES: Final = 2 << 20


@dataclass(frozen=True)
class ArenaLayout:
    """Where the blobs of one model lie: layer by layer, expert by expert, one stride apart, as in the pack's files."""

    fingerprint: str
    num_layers: int
    num_experts: int
    blob_nbytes: int
    blob_stride_nbytes: int

    @classmethod
    def of(cls, spec: ModelSpec) -> "ArenaLayout":
        """The layout for a model."""
        layout = spec.layout
        return cls(
            spec.fingerprint, spec.num_moe_layers, spec.num_experts, layout.blob_nbytes, layout.blob_stride_nbytes
        )

    @property
    def num_blobs(self) -> int:
        """Experts over all MoE layers."""
        return self.num_layers * self.num_experts

    @property
    def data_offset(self) -> int:
        """Where the first blob starts."""
        return align_up(HEADER_NBYTES + self.num_blobs * ENTRY_NBYTES, _DATA_ALIGNMENT_NBYTES)

    @property
    def nbytes(self) -> int:
        """Size of the whole arena."""
        return self.data_offset + self.num_blobs * self.blob_stride_nbytes

    def index_of(self, expert: ExpertId) -> int:
        """The expert's place in the arena's order; raises ValueError for an expert the model does not have."""
        if not (0 <= expert.layer < self.num_layers and 0 <= expert.expert < self.num_experts):
            raise ValueError(f"{expert} is not an expert; the model has {self.num_layers} × {self.num_experts}")
        return expert.layer * self.num_experts + expert.expert

    def expert_at(self, index: int) -> ExpertId:
        """The expert at a place in the arena's order."""
        return ExpertId(*divmod(index, self.num_experts))

    def offset_of(self, index: int) -> int:
        """Where the blob starts in the arena."""
        return self.data_offset + index * self.blob_stride_nbytes


class Arena:
    """One mapped arena. Made by `create` or, from a descriptor that a compute node kept, by `adopt`."""

    def __init__(self, fd: int, layout: ArenaLayout, mapping: SharedMapping, header: ArenaHeader, kind: str) -> None:
        self.fd = fd
        self.layout = layout
        self.kind = kind
        self.uuid = header.uuid
        self.mapping = mapping
        self._directory_view = mapping.view[HEADER_NBYTES : HEADER_NBYTES + layout.num_blobs * ENTRY_NBYTES]
        self.directory = Directory(self._directory_view)

    @classmethod
    def create(cls, layout: ArenaLayout, kind: str) -> "Arena":
        """An empty arena. Raises ResourceExhausted."""
        header = ArenaHeader(
            uuid=uuid.uuid4().hex,
            fingerprint=layout.fingerprint,
            num_blobs=layout.num_blobs,
            nbytes=layout.nbytes,
            data_offset=layout.data_offset,
            blob_stride_nbytes=layout.blob_stride_nbytes,
        )
        encoded = header.encode()
        with ExitStack() as undo:
            fd = ARENA_KINDS[kind].create(layout.nbytes)
            undo.callback(os.close, fd)
            mapping = SharedMapping(fd, layout.nbytes)
            undo.pop_all()
        mapping.view[: len(encoded)] = encoded
        return cls(fd, layout, mapping, header, kind)

    @classmethod
    def adopt(cls, fd: int, layout: ArenaLayout, kind: str) -> "Arena":
        """Takes over `fd` (and owns it from here) if it is a whole arena of this very model.

        Raises:
            InvalidInput: it is not an arena, or its header is damaged.
            ModelMismatch: it is an arena of another model or layout.
        """
        with ExitStack() as undo:
            undo.callback(os.close, fd)
            ARENA_KINDS[kind].check(fd, layout.nbytes)
            mapping = SharedMapping(fd, layout.nbytes)
            undo.callback(mapping.close)
            header = ArenaHeader.decode(bytes(mapping.view[:HEADER_NBYTES]))
            _check_layout(header, layout)
            undo.pop_all()
        return cls(fd, layout, mapping, header, kind)

    def blob_view(self, index: int) -> memoryview:
        """The blob's bytes, without alignment; release it before `close`."""
        offset = self.layout.offset_of(index)
        return self.mapping.view[offset : offset + self.layout.blob_nbytes]

    def checksum(self, index: int) -> int:
        """xxh3-64 of the bytes that lie there now."""
        with self.blob_view(index) as blob:
            return int(xxhash.xxh3_64_intdigest(blob))

    def close(self) -> None:
        """Lets go of the memory; it lives on while a compute node maps it."""
        self._directory_view.release()
        self.mapping.close()
        os.close(self.fd)


def _check_layout(header: ArenaHeader, layout: ArenaLayout) -> None:
    if header.fingerprint != layout.fingerprint:
        raise ModelMismatch(
            f"The arena holds the model with fingerprint {header.fingerprint}; this store was started for "
            f"{layout.fingerprint}."
        )
    found = (header.num_blobs, header.nbytes, header.data_offset, header.blob_stride_nbytes)
    wanted = (layout.num_blobs, layout.nbytes, layout.data_offset, layout.blob_stride_nbytes)
    if found != wanted:
        raise InvalidInput(f"The arena is laid out as {found} (blobs, bytes, data offset, stride), not as {wanted}.")
