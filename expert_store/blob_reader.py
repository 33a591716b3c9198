"""Reads blobs from a pack's files straight into the arena, and verifies them there.

Called from the fill's threads; each call opens its own descriptor, so nothing is shared between them.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from expert_store.arena import Arena, ArenaLayout
from promoe.errors import PackDamaged
from promoe.pack_manifest import PackManifest, layer_file

logger = logging.getLogger(__name__)

# Large enough to keep a disk busy, small enough that several threads share the work of a small pack.
_READ_NBYTES: Final = 16 << 20


def checksums_of(manifest: PackManifest, layout: ArenaLayout) -> list[int]:
    """xxh3-64 of each blob, in the arena's order."""
    return [manifest.checksum_of(layout.expert_at(index)) for index in range(layout.num_blobs)]


def check_sizes(pack_dir: Path, layout: ArenaLayout) -> None:
    """Raises PackDamaged when a layer's file is missing or has not the size that the manifest implies."""
    wanted = layout.num_experts * layout.blob_stride_nbytes
    for layer in range(layout.num_layers):
        path = layer_file(pack_dir, layer)
        try:
            found = path.stat().st_size
        except OSError as error:
            raise PackDamaged(f"{path} cannot be read ({error.strerror}). Run `promoe pack` again.") from error
        if found != wanted:
            raise PackDamaged(f"{path} has {found} bytes where the manifest implies {wanted}. Run `promoe pack` again.")


def reading_groups(layout: ArenaLayout, indices: list[int]) -> Iterator[list[int]]:
    """Cuts places into runs that lie side by side in one layer's file, each about one large read long."""
    most = max(1, _READ_NBYTES // layout.blob_stride_nbytes)
    group: list[int] = []
    for index in indices:
        follows = bool(group) and index == group[-1] + 1 and index % layout.num_experts != 0
        if group and (not follows or len(group) == most):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class BlobReader:
    """The disk tier of one arena.

    Args:
        pack_dir: folder of the pack; its sizes were checked.
        arena: where blobs go.
        checksums: xxh3-64 of each blob, in the arena's order.
    """

    def __init__(self, pack_dir: Path, arena: Arena, checksums: list[int]) -> None:
        self._pack_dir = pack_dir
        self._arena = arena
        self._checksums = checksums
        self._direct = True

    @property
    def uses_direct_io(self) -> bool:
        """False once the pack's file system has refused O_DIRECT."""
        return self._direct

    def load(self, group: list[int]) -> None:
        """Reads one run of blobs into the arena and verifies each; one that does not verify is read once more.

        Raises:
            PackDamaged: names the file and the expert.
            ResourceExhausted: there is no memory for the pages.
        """
        layout = self._arena.layout
        with self._file_of(group[0]) as fd:
            self._read(fd, group[0], len(group))
            for index in group:
                if self.is_intact(index):
                    continue
                logger.warning("%s did not verify; reading it once more", layout.expert_at(index))
                self._read(fd, index, 1)
                if not self.is_intact(index):
                    raise PackDamaged(
                        f"{self._path_of(index)}: the blob of {layout.expert_at(index)} is damaged (its checksum does "
                        "not fit, twice). Run `promoe pack` again."
                    )

    def is_intact(self, index: int) -> bool:
        """True when the bytes in the arena are those that were packed."""
        return self._arena.checksum(index) == self._checksums[index]

    def _path_of(self, index: int) -> Path:
        return layer_file(self._pack_dir, self._arena.layout.expert_at(index).layer)

    @contextmanager
    def _file_of(self, index: int) -> Iterator[int]:
        path = self._path_of(index)
        try:
            fd = self._open(path)
        except OSError as error:
            raise PackDamaged(f"{path} cannot be opened ({error.strerror}).") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, path: Path) -> int:
        if self._direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._refuse_direct(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _refuse_direct(self, path: Path) -> None:
        if self._direct:
            logger.warning("The file system of %s refuses O_DIRECT; reading through the page cache.", path)
        self._direct = False

    def _read(self, fd: int, first: int, count: int) -> None:
        layout = self._arena.layout
        start = layout.offset_of(first)
        nbytes = count * layout.blob_stride_nbytes
        in_file = layout.expert_at(first).expert * layout.blob_stride_nbytes
        # Asking for the pages first turns a lack of memory into an error here instead of a signal later.
        self._arena.mapping.populate(start, nbytes)
        with self._arena.mapping.view[start : start + nbytes] as target:
            done = 0
            while done < nbytes:
                with target[done : min(done + _READ_NBYTES, nbytes)] as piece:
                    done += self._read_piece(fd, piece, in_file + done, first + done // layout.blob_stride_nbytes)

    def _read_piece(self, fd: int, piece: memoryview, offset: int, index: int) -> int:
        path, expert = self._path_of(index), self._arena.layout.expert_at(index)
        try:
            got = os.preadv(fd, [piece], offset)
        except OSError as error:
            if error.errno == errno.EINVAL and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                # Some file systems open with O_DIRECT and refuse the read.
                self._refuse_direct(path)
                with self._file_of(index) as buffered_fd:
                    return self._read_piece(buffered_fd, piece, offset, index)
            raise PackDamaged(f"{path}: the blob of {expert} cannot be read ({error.strerror}).") from error
        if got == 0:
            raise PackDamaged(f"{path} ends before the blob of {expert} does. Run `promoe pack` again.")
        return got
