"""What became of which version, when, by whom and why: a small file that is only ever added to.

One JSON document a line, numbered; the numbers say the order, not the clock, which may jump. A last line that was cut
off by a crash never happened.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from promoe.errors import InvalidInput, ResourceExhausted
from promoe.predictor_versions import VersionAction, VersionChange, VersionMetric


@dataclass(frozen=True)
class Wish:
    """Who asks for a change.

    Attributes:
        who: a person or a program.
        why: in their words.
        expected: the version that they believe to be active; None: whichever is.
        numbers: what they decided it on.
    """

    who: str
    why: str
    expected: str | None = None
    numbers: tuple[VersionMetric, ...] = ()

    def __post_init__(self) -> None:
        if not self.who.strip():
            raise InvalidInput("Nobody is named as the one who asks; who it was is written down.")


class VersionLog:
    """The changes of one folder; without a file they are kept in memory, for as long as the process lives.

    Args:
        path: of the file, made with the first line; None for memory alone.
        service: whose changes are added.
        wall_clock: seconds since the epoch.
    """

    def __init__(self, path: Path | None, service: str, wall_clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._service = service
        self._wall_clock = wall_clock
        self._kept: list[VersionChange] = []

    def changes(self) -> list[VersionChange]:
        """All of them, oldest first, those of other services too; raises ResourceExhausted when it cannot be read."""
        if self._path is None:
            return list(self._kept)
        return [change for line in _whole_lines(self._path) if (change := _decode(line)) is not None]

    def last_active(self) -> str | None:
        """What this service's last change left active; None before the first, a start being none."""
        changes = (
            change for change in self.changes() if change.action in (VersionAction.ACTIVATE, VersionAction.ROLLBACK)
        )
        mine = [change.after for change in changes if change.service == self._service]
        return mine[-1] if mine else None

    def add(self, action: VersionAction, before: str, after: str, wish: Wish, version: str = "") -> VersionChange:
        """Adds one line, on the disk when this returns.

        Args:
            action, before, after, version: see VersionChange.
            wish: who asks, and why.

        Raises:
            ResourceExhausted: it cannot be written; nothing was added.
        """

        def numbered(number: int) -> VersionChange:
            return VersionChange(
                number=number,
                at_unix_s=self._wall_clock(),
                service=self._service,
                action=action,
                before=before,
                after=after,
                who=wish.who,
                why=wish.why,
                numbers=wish.numbers,
                version=version,
            )

        if self._path is None:
            self._kept.append(numbered(len(self._kept) + 1))
            return self._kept[-1]
        try:
            self._path.parent.mkdir(mode=0o770, parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            # Other services, and other admins, add to the same file.
            fcntl.flock(fd, fcntl.LOCK_EX)
            # Lines that cannot be read here have numbers, too.
            change = numbered(1 + max(map(_number_of, _whole_lines(self._path)), default=0))
            _append(fd, change)
            return change
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            os.close(fd)

    def _unwritable(self, error: OSError) -> ResourceExhausted:
        return ResourceExhausted(
            f"The versions' history {self._path} cannot be written ({error.strerror}); nothing was changed."
        )


def _whole_lines(path: Path) -> list[bytes]:
    """None where there is no file; raises ResourceExhausted when it cannot be read."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResourceExhausted(f"The versions' history {path} cannot be read ({error.strerror}).") from error
    return text[: text.rfind(b"\n") + 1].splitlines()


def _append(fd: int, change: VersionChange) -> None:
    """Behind the last whole line; what a crash left behind it goes."""
    end = os.pread(fd, os.fstat(fd).st_size, 0).rfind(b"\n") + 1
    line = json.dumps({**asdict(change), "action": change.action.value}).encode() + b"\n"
    try:
        os.ftruncate(fd, end)
        if os.pwrite(fd, line, end) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, end)
        raise


def _decode(line: bytes) -> VersionChange | None:
    """None for a line of another version of promoe, or one that was damaged: history is for people, too."""
    try:
        document = json.loads(line)
        if not isinstance(document["number"], int):
            return None
        numbers = tuple(VersionMetric(**number) for number in document["numbers"])
        return VersionChange(**{**document, "action": VersionAction(document["action"]), "numbers": numbers})
    except (ValueError, TypeError, KeyError):
        return None


def _number_of(line: bytes) -> int:
    """0 where it does not say."""
    try:
        number = json.loads(line)["number"]
    except (ValueError, TypeError, KeyError):
        return 0
    return number if isinstance(number, int) else 0
