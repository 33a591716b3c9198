"""The store's run folder: one store at a time, and what a restarted one must know of the one before it."""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from expert_store.config import StoreConfig
from promoe.errors import AlreadyRunning, InvalidInput, ResourceExhausted

logger = logging.getLogger(__name__)

_STATE_FILE: Final = "store.json"
_LOCK_FILE: Final = "store.lock"


@dataclass(frozen=True)
class AttachedNode:
    """A compute node that held a lease.

    Attributes:
        instance_id: the node process's own name for itself.
        pid: as the store sees it; 0 when the node is in another pid namespace.
        started_ticks: start time of that pid, so that a reused number is not mistaken for it; 0 with pid 0.
    """

    instance_id: str
    pid: int
    started_ticks: int

    @classmethod
    def of(cls, instance_id: str, pid: int) -> "AttachedNode | None":
        """Takes down the process's start time; None for a process that is gone, whose lease is about to end."""
        started = _started_ticks(pid)
        return cls(instance_id, pid, started) if started or pid == 0 else None

    def may_live(self) -> bool:
        """False when the process is known to be gone."""
        return self.pid == 0 or _started_ticks(self.pid) == self.started_ticks


@dataclass(frozen=True)
class StoreState:
    """What a store leaves behind for its successor."""

    arena_uuid: str
    fingerprint: str
    nodes: tuple[AttachedNode, ...]


class RunDir:
    """The folder, held by this process from construction to `close`.

    Raises:
        AlreadyRunning: another store holds the folder.
        ResourceExhausted: the folder cannot be made or written.
        InvalidInput: it belongs to somebody who may not have the arena.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._path = config.run_dir
        self._written: StoreState | None = None
        with ExitStack() as held:
            try:
                self._path.mkdir(mode=0o770, parents=True, exist_ok=True)
                _check_owner(self._path, config.peer_uids)
                held.enter_context(_locked(self._path / _LOCK_FILE))
            except OSError as error:
                raise ResourceExhausted(
                    f"The run folder {self._path} cannot be used ({error.strerror}: {error.filename}); "
                    "set store.run_dir to one that can."
                ) from error
            self._held = held.pop_all()

    def read_state(self) -> StoreState | None:
        """What the store before this one left, or None."""
        try:
            document = json.loads((self._path / _STATE_FILE).read_text())
            nodes = tuple(AttachedNode(**node) for node in document["nodes"])
            return StoreState(str(document["arena_uuid"]), str(document["fingerprint"]), nodes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The state of the former store cannot be read (%r); starting without it.", error)
            return None

    def write_state(self, state: StoreState) -> None:
        """Replaces the state atomically."""
        if state == self._written:
            return
        partial = self._path / f"{_STATE_FILE}.tmp"
        try:
            partial.write_text(json.dumps(asdict(state)))
            partial.replace(self._path / _STATE_FILE)
        except OSError as error:
            logger.warning(
                "The store's state cannot be written (%s): after a crash a new store would fill anew.", error.strerror
            )
            return
        self._written = state

    def close(self) -> None:
        """Lets the next store in. The state stays: nodes may live on."""
        self._held.close()


def _check_owner(path: Path, peer_uids: frozenset[int]) -> None:
    """The folder's owner can put other sockets in the place of ours."""
    owner = path.stat().st_uid
    if owner not in peer_uids:
        raise InvalidInput(f"The run folder {path} belongs to user {owner}; see store.run_dir and store.allowed_uids.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; raises AlreadyRunning when another process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise AlreadyRunning(
                f"Another expert store (pid {holder}) holds {path}. Stop it, or give this one another store.run_dir."
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _started_ticks(pid: int) -> int:
    """The process's start time since boot in clock ticks, or 0 if there is no such process here."""
    if pid <= 0:
        return 0
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The second field is the command's name in brackets, which may hold anything.
    fields = text.rpartition(")")[2].split()
    state, started = fields[0], fields[19]
    return 0 if state in "ZX" else int(started)
