"""Writes one layer's experts file: blobs at multiples of the stride, a checksum each, nothing visible until whole."""

import os
from pathlib import Path

import torch
import xxhash

from promoe.model_spec import ExpertLayout
from promoe.pack_manifest import layer_file


class LayerFileWriter:
    """Takes a layer's tensors, best in the layout's order; `finish` makes the file visible.

    Not thread-safe; each method may be called from another thread than the one before.
    """

    def __init__(self, pack_dir: Path, layer: int, layout: ExpertLayout, num_experts: int) -> None:
        self._path = layer_file(pack_dir, layer)
        self._partial = self._path.with_suffix(".bin.tmp")
        self._layout = layout
        self._num_experts = num_experts
        self._num_put = 0
        self._early: dict[str, torch.Tensor] = {}
        self._digests = [xxhash.xxh3_64() for _ in range(num_experts)]
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor of the layout, of shape (num_experts, *slice.shape), for every expert.

        Checksums run through a blob from its begin, so a tensor that comes before its turn waits in memory.
        """
        self._early[name] = tensor
        while self._num_put < len(self._layout.tensors):
            turn = self._early.pop(self._layout.tensors[self._num_put].name, None)
            if turn is None:
                return
            self._write_next(turn)

    def _write_next(self, tensor: torch.Tensor) -> None:
        slot = self._layout.tensors[self._num_put]
        assert tensor.shape == (self._num_experts, *slot.shape), f"{slot.name} has shape {tuple(tensor.shape)}"
        before = self._layout.tensors[self._num_put - 1] if self._num_put else None
        gap = bytes(slot.offset - (before.offset + before.nbytes)) if before is not None else b""
        for expert, digest in enumerate(self._digests):
            content = tensor_bytes(tensor[expert])
            digest.update(gap)
            digest.update(content)
            write_at(self._fd, content, expert * self._layout.blob_stride_nbytes + slot.offset)
        self._num_put += 1

    def finish(self) -> tuple[str, ...]:
        """Makes the file durable and visible; returns the blobs' checksums in hexadecimal."""
        assert self._num_put == len(self._layout.tensors), f"{self._path} was given {self._num_put} tensors"
        os.ftruncate(self._fd, self._num_experts * self._layout.blob_stride_nbytes)
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._partial.replace(self._path)
        sync_folder(self._path.parent)
        return tuple(digest.hexdigest() for digest in self._digests)

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
    """Writes all of `content` at `offset`: one call to the system may write less than it was given."""
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], offset + written)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
