"""Writes one layer's experts file: blobs at multiples of the stride, a checksum each, nothing visible until whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
import xxhash

from promoe.model_spec import ExpertLayout
from promoe.pack_manifest import layer_file

_STEP_NBYTES: Final = 256 << 10
"""Bytes per write: with 4 MiB the kernel (6.18, ext4) spends five times the processor time on finding large folios."""


class LayerFileWriter:
    """Takes a layer's experts, some at a time; `finish` makes the file visible.

    Not thread-safe; each method may be called from another thread than the one before.
    """

    def __init__(self, pack_dir: Path, layer: int, layout: ExpertLayout, num_experts: int) -> None:
        self._path = layer_file(pack_dir, layer)
        self._partial = self._path.with_suffix(".bin.tmp")
        self._layout = layout
        self._num_experts = num_experts
        self._checksums: dict[int, str] = {}
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def put(self, first_expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the blobs of some experts.

        Args:
            first_expert: the expert of the tensors' first row.
            tensors: each parameter of the layout, of shape (some experts, *shape of its slice).
        """
        num_put = len(next(iter(tensors.values())))
        for slot in self._layout.tensors:
            found = tuple(tensors[slot.name].shape)
            assert found == (num_put, *slot.shape), f"{slot.name} has shape {found} instead of {(num_put, *slot.shape)}"
        for row in range(num_put):
            digest = xxhash.xxh3_64()
            blob_offset = (first_expert + row) * self._layout.blob_stride_nbytes
            end = 0
            for slot in self._layout.tensors:
                content = tensor_bytes(tensors[slot.name][row])
                digest.update(bytes(slot.offset - end))  # the gap before it: zeros, here and in the file
                digest.update(content)
                write_at(self._fd, content, blob_offset + slot.offset)
                end = slot.offset + slot.nbytes
            self._checksums[first_expert + row] = str(digest.hexdigest())

    def finish(self) -> tuple[str, ...]:
        """Makes the file durable and visible; returns the blobs' checksums in hexadecimal."""
        assert len(self._checksums) == self._num_experts, f"{self._path} was given {len(self._checksums)} experts"
        os.ftruncate(self._fd, self._num_experts * self._layout.blob_stride_nbytes)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._partial.replace(self._path)
        sync_folder(self._path.parent)
        return tuple(self._checksums[expert] for expert in range(self._num_experts))

    def abandon(self) -> None:
        """Removes what was written, unless it is finished."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes, little-endian, row by row; copied only if it is not contiguous."""
    content: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return content


def write_at(fd: int, content: memoryview, offset: int) -> None:
    """Writes all of `content` at `offset`, in steps of a size that the page cache takes cheaply."""
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written : written + _STEP_NBYTES], offset + written)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
