"""The folder of one running stack: who holds it, its sockets and logs, and where clients find the endpoint."""

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from promoe.errors import AlreadyRunning, InvalidInput, ResourceExhausted
from promoe.rpc import MAX_SOCKET_PATH_NBYTES

RUN_DIR_VARIABLE: Final = "PROMOE_RUN_DIR"
ENDPOINT_VARIABLE: Final = "PROMOE_ENDPOINT"
DEFAULT_LISTEN: Final = "127.0.0.1:50051"

_STATE_FILE: Final = "stack.json"
_LOCK_FILE: Final = "stack.lock"
# The longest name of a socket that anybody makes in here.
_LONGEST_SOCKET_NAME: Final = "predictor.sock.lock"


@dataclass(frozen=True)
class StackState:
    """What `promoe up` tells the other commands.

    Attributes:
        pid: the supervisor.
        phase: `pack`, `fill`, `load`, `ready`, `restart` or `stop`.
        endpoint: where the compute node listens.
        store_endpoint: where the expert store listens.
        model: what was asked for, as text.
        pack: the pack's folder.
        started_unix_s: wall-clock time of the start.
        http_url: where clients on this machine find the HTTP API; empty for none.
    """

    pid: int
    phase: str
    endpoint: str
    store_endpoint: str
    model: str
    pack: str
    started_unix_s: float
    http_url: str = ""


def default_run_dir() -> Path:
    """`$PROMOE_RUN_DIR`, else under the user's runtime folder, else under /tmp."""
    asked = os.environ.get(RUN_DIR_VARIABLE)
    if asked:
        return Path(asked).expanduser()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "promoe" if runtime else Path(f"/tmp/promoe-{os.getuid()}")


class RunDir:
    """One stack's folder; nothing is made before `hold`."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_run_dir()).expanduser().absolute()

    @property
    def store_endpoint(self) -> str:
        """Where a stack in this folder has its store."""
        return f"unix:{self.path / 'store.sock'}"

    @property
    def predictor_endpoint(self) -> str:
        """Where a stack in this folder has its predictor."""
        return f"unix:{self.path / 'predictor.sock'}"

    def log(self, name: str) -> Path:
        """The log file of a service."""
        return self.path / f"{name}.log"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Makes the folder (private to the user) and holds it for this process; the kernel lets go if it dies.

        Raises:
            InvalidInput: its sockets' paths would be too long, or it belongs to somebody else.
            AlreadyRunning: another supervisor holds it.
            ResourceExhausted: it cannot be made.
        """
        self._check_path_length()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceExhausted(
                f"The run folder {self.path} cannot be made ({error.strerror}); give another one with --run-dir."
            ) from error
        self._check_owner()
        fd = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _try_lock(fd):
                state = self.read_state()
                who = f" (process {state.pid})" if state else ""
                raise AlreadyRunning(
                    f"promoe is already running in {self.path}{who}. Stop it first, or give this one another "
                    "--run-dir and --listen."
                )
            (self.path / _STATE_FILE).unlink(missing_ok=True)
            yield
            (self.path / _STATE_FILE).unlink(missing_ok=True)
        finally:
            os.close(fd)

    def write_state(self, state: StackState) -> None:
        """Replaces the state atomically; only the holder calls this."""
        partial = self.path / f"{_STATE_FILE}.tmp"
        partial.write_text(json.dumps(asdict(state)))
        partial.replace(self.path / _STATE_FILE)

    def read_state(self) -> StackState | None:
        """The running stack's state, or None when no supervisor is alive here."""
        try:
            document = json.loads((self.path / _STATE_FILE).read_text())
            fd = os.open(self.path / _LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            return None
        try:
            if _try_lock(fd, fcntl.LOCK_SH):
                return None  # left behind by a supervisor that was killed
        finally:
            os.close(fd)
        try:
            return StackState(**document)
        except TypeError:
            return None  # written by another version

    def _check_path_length(self) -> None:
        nbytes = len(os.fsencode(self.path / _LONGEST_SOCKET_NAME))
        if nbytes > MAX_SOCKET_PATH_NBYTES:
            raise InvalidInput(
                f"The run folder's path {self.path} is too long: unix sockets in it would have {nbytes} bytes, and the "
                f"system allows {MAX_SOCKET_PATH_NBYTES}. Give a shorter --run-dir."
            )

    def _check_owner(self) -> None:
        """A folder under /tmp may have been laid there by anybody: sockets in it must be ours alone."""
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise InvalidInput(f"{self.path} is not a folder of this user; give another one with --run-dir.")
        if status.st_mode & 0o022:
            raise InvalidInput(
                f"Others may write to {self.path}; run `chmod 700 {self.path}` or give another --run-dir."
            )


def find_endpoint(asked: str | None, run_dir: RunDir) -> str:
    """Where to find the compute node: as asked, `$PROMOE_ENDPOINT`, the stack running here, or the default."""
    if asked:
        return asked
    from_environment = os.environ.get(ENDPOINT_VARIABLE)
    if from_environment:
        return from_environment
    state = run_dir.read_state()
    return state.endpoint if state else DEFAULT_LISTEN


def uptime_s(state: StackState) -> float:
    """Seconds since the stack was started, by the wall clock."""
    return max(0.0, time.time() - state.started_unix_s)


def _try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
