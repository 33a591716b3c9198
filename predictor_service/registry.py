"""The registry: a folder of trained predictors, one file per version, each whole, checked and never changed.

    NAME@VERSION.safetensors      an artifact; its manifest says the same name and version
    .NAME@VERSION.….part          one that is being published; locked by who writes it, swept away when nobody does

Knows no predictor. Several processes may use one folder.
"""

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from predictor_service.artifact import SUFFIX, ArtifactManifest, read_artifact, read_manifest
from promoe.errors import InvalidInput, ModelNotFound, PromoeError, ResourceExhausted
from promoe.model_spec import ModelSpec

_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_PARTIAL_SUFFIX: Final = ".part"
_OUT_OF_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class VersionName(NamedTuple):
    """A predictor's version, printed `name@version`."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @classmethod
    def parse(cls, text: str) -> "VersionName":
        """Raises InvalidInput unless it is `name@version`, both of letters, digits and `._+-`."""
        name, at, version = text.partition("@")
        if not at or not _WORD.fullmatch(name) or not _WORD.fullmatch(version):
            raise InvalidInput(
                f"{text!r} is no version of a predictor; expected NAME@VERSION of letters, digits and `._+-`."
            )
        return cls(name, version)


@dataclass(frozen=True)
class RegistryEntry:
    """A version in the folder.

    Attributes:
        name: which; from the file's name.
        path: of its file.
        nbytes: of its file.
        published_unix_s: wall-clock time, for people.
        manifest: what it says of itself; None where it cannot be read.
        fault: why it cannot be used; empty when it can, as far as its manifest tells.
    """

    name: VersionName
    path: Path
    nbytes: int
    published_unix_s: float
    manifest: ArtifactManifest | None
    fault: str = ""


class Registry:
    """One folder; made with the first publication.

    Args:
        folder: see the module.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[RegistryEntry]:
        """All versions, by name and then oldest first; checksums are not looked at."""
        found: list[RegistryEntry] = []
        for path in self.folder.glob(f"*@*{SUFFIX}"):
            try:
                found.append(_entry_of(path))
            except (InvalidInput, FileNotFoundError):  # not one of ours, or removed just now
                continue
        return sorted(found, key=lambda entry: (entry.name.name, entry.published_unix_s, entry.name.version))

    def path_of(self, name: VersionName) -> Path:
        """Raises ModelNotFound, listing the versions there are."""
        path = self._path(name)
        if not path.is_file():
            others = ", ".join(str(entry.name) for entry in self.entries()) or "none"
            raise ModelNotFound(f"There is no version {name} in {self.folder}; published: {others}.")
        return path

    def publish(self, source: Path, spec: ModelSpec | None = None) -> RegistryEntry:
        """Copies an artifact into the folder, whole and checked, or not at all; publishing it twice changes nothing.

        Args:
            source: a trained artifact.
            spec: of the model it must fit; None: it is not asked.

        Raises:
            ModelNotFound: there is no such file.
            InvalidInput: it is damaged, or another artifact has this name and version.
            ModelMismatch: it was trained for another model.
            ResourceExhausted: the folder cannot take it.
        """
        if not source.is_file():
            raise ModelNotFound(f"There is no predictor artifact at {source}.")
        try:
            content = source.read_bytes()
            self.folder.mkdir(mode=0o770, parents=True, exist_ok=True)
            self.sweep()
            with self._partial(source.stem) as partial:
                partial.write_bytes(content)
                manifest = read_artifact(partial).manifest
                if spec is not None:
                    manifest.check_model(spec, source)
                target = self._path(VersionName.parse(f"{manifest.name}@{manifest.version}"))
                _flush(partial)
                self._link(partial, target, content)
                _flush(self.folder)
        except OSError as error:
            if error.errno in _OUT_OF_ROOM:
                raise ResourceExhausted(
                    f"{source} cannot be published in {self.folder} ({error.strerror}); nothing was changed."
                ) from error
            raise
        return _entry_of(target)

    def remove(self, name: VersionName) -> None:
        """Deletes a version; raises ModelNotFound as `path_of`."""
        self.path_of(name).unlink(missing_ok=True)
        _flush(self.folder)

    def prune(
        self,
        name: str,
        keep: int,
        in_use: frozenset[VersionName],
        counts: Callable[[RegistryEntry], bool] = lambda _: True,
    ) -> list[VersionName]:
        """Deletes the oldest versions of a name beyond the newest `keep`, but none in use; returns those deleted.

        Args:
            name: of the versions.
            keep: how many stay.
            in_use: that stay, however old.
            counts: those that do not are left alone.
        """
        mine = [entry.name for entry in self.entries() if entry.name.name == name and counts(entry)]
        doomed = [version for version in mine[: max(0, len(mine) - keep)] if version not in in_use]
        for version in doomed:
            self._path(version).unlink(missing_ok=True)
        if doomed:
            _flush(self.folder)
        return doomed

    def sweep(self) -> None:
        """Deletes what publishers left behind that were killed."""
        for partial in self.folder.glob(f".*{_PARTIAL_SUFFIX}"):
            try:
                fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            except OSError:  # its writer was quicker
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink(missing_ok=True)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)

    def _path(self, name: VersionName) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    @contextmanager
    def _partial(self, stem: str) -> Iterator[Path]:
        """A file that nobody takes for a version, locked while this block lasts and gone after it."""
        fd, path = self._locked_partial(stem)
        try:
            # A service of the same group may be another user's, as in a container.
            os.fchmod(fd, 0o640)
            yield path
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def _locked_partial(self, stem: str) -> tuple[int, Path]:
        while True:
            fd, path = tempfile.mkstemp(_PARTIAL_SUFFIX, f".{stem}.", self.folder)
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Before it was locked, somebody who sweeps may have taken it for what a killed publisher left.
            if os.fstat(fd).st_nlink:
                return fd, Path(path)
            os.close(fd)

    def _link(self, partial: Path, target: Path, content: bytes) -> None:
        """The one step in which the version appears; of two that publish it, the second finds the first."""
        try:
            os.link(partial, target)
        except FileExistsError as error:
            if target.read_bytes() != content:
                raise InvalidInput(
                    f"{target.name.removesuffix(SUFFIX)} is published already, with other contents, and versions never "
                    "change: give it another version."
                ) from error


def _entry_of(path: Path) -> RegistryEntry:
    name = VersionName.parse(path.name.removesuffix(SUFFIX))
    status = path.stat()
    manifest: ArtifactManifest | None = None
    fault = ""
    try:
        manifest = read_manifest(path)
    except PromoeError as error:
        fault = str(error)
    if manifest is not None and (manifest.name, manifest.version) != name:
        fault = f"{path} says that it is {manifest.name}@{manifest.version}."
    return RegistryEntry(name, path, status.st_size, status.st_mtime, manifest, fault)


def _flush(path: Path) -> None:
    """Onto the disk: a file's contents, or a folder's names."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
