"""What is already finished in a pack folder that is not a pack yet, and the lock that keeps a second packer out."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from promoe.errors import AlreadyRunning, InvalidInput
from promoe.pack_manifest import DENSE_FOLDER, EXPERTS_FOLDER, MANIFEST_FILE, ROUTERS_FILE, PackManifest

WORK_FOLDER: Final = ".packing"
LOCK_FILE: Final = ".lock"
_SOURCE_FILE: Final = "source.json"


class PackJournal:
    """Checksums of finished parts, so that a stopped packing goes on where it was.

    Entries are claims: whoever reuses a part compares its bytes first. They need no fsync for that reason.
    """

    def __init__(self, pack_dir: Path, source_fingerprint: str, converter: str, *, keep: bool = False) -> None:
        """Keeps the entries of this source and throws away another's leftovers.

        Args:
            pack_dir: the pack folder, locked by the caller.
            source_fingerprint: names checkpoint and dtype.
            converter: versions of what converts; leftovers of another one are not mixed with new parts.
            keep: never throw away: the folder is a finished pack of this source, about to be adopted.
        """
        self._pack_dir = pack_dir
        self._folder = pack_dir / WORK_FOLDER
        source = {"source_fingerprint": source_fingerprint, "converter": converter}
        if self._read(_SOURCE_FILE) != source:
            if not keep:
                self._discard()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(_SOURCE_FILE, source)

    def layer_checksums(self, layer: int) -> tuple[str, ...] | None:
        """The blobs' checksums of a finished layer, or None."""
        entry = self._read(_layer_entry(layer))
        return None if entry is None else tuple(entry.values())

    def record_layer(self, layer: int, checksums: tuple[str, ...]) -> None:
        """Call it when the layer's file is durable."""
        self._write(_layer_entry(layer), {str(expert): value for expert, value in enumerate(checksums)})

    def dense_checksums(self) -> dict[str, str] | None:
        """The finished dense files' checksums by path relative to the pack, or None."""
        return self._read("dense.json")

    def record_dense(self, checksums: dict[str, str]) -> None:
        """Call it when all dense files are durable."""
        self._write("dense.json", checksums)

    def adopt(self, manifest: PackManifest) -> None:
        """Takes down what a finished pack claims; the pack stays one."""
        for layer, checksums in enumerate(manifest.blob_checksums):
            self.record_layer(layer, checksums)
        self.record_dense(manifest.dense_checksums)

    def take_apart(self) -> None:
        """Makes a finished pack an unfinished one, before any part of it is made again; idempotent."""
        (self._pack_dir / MANIFEST_FILE).unlink(missing_ok=True)

    def _discard(self) -> None:
        for folder in (self._folder, self._pack_dir / EXPERTS_FOLDER, self._pack_dir / DENSE_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        (self._pack_dir / ROUTERS_FILE).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the journal of a finished pack."""
        shutil.rmtree(self._folder)

    def _read(self, name: str) -> dict[str, str] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        try:
            entry = json.loads(path.read_bytes())
        except ValueError:  # cut off by a crash: as good as not there
            return None
        return entry if isinstance(entry, dict) else None

    def _write(self, name: str, entry: dict[str, str]) -> None:
        partial = self._folder / f"{name}.tmp"
        partial.write_text(json.dumps(entry))
        partial.replace(self._folder / name)


@contextmanager
def locked_pack_folder(pack_dir: Path) -> Iterator[None]:
    """Creates the folder if need be and keeps other packers out of it.

    Raises:
        InvalidInput: the folder holds something else than a pack.
        AlreadyRunning: another process is packing into it.
    """
    if pack_dir.exists() and not pack_dir.is_dir():
        raise InvalidInput(f"{pack_dir} is a file; give a folder for the pack.")
    if pack_dir.is_dir() and not _is_free_or_ours({path.name for path in pack_dir.iterdir()}):
        raise InvalidInput(f"{pack_dir} is not empty and not a pack; give an empty or a new folder.")
    pack_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(pack_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"Another process is packing into {pack_dir}; wait for it or stop it.") from None
        yield
    finally:
        os.close(fd)


def _is_free_or_ours(names: set[str]) -> bool:
    """Whether a folder's content may be thrown away: other programs have manifests and lock files too."""
    return names <= {LOCK_FILE} or WORK_FOLDER in names or {MANIFEST_FILE, EXPERTS_FOLDER} <= names


def _layer_entry(layer: int) -> str:
    return f"layer_{layer:05d}.json"
