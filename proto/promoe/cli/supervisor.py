"""One service process: started, watched, restarted with backoff, stopped. Knows no service and no model."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from promoe.errors import Unavailable

_LAST_WORDS: Final = 12
_MAX_DOUBLINGS: Final = 30
MAX_LOG_NBYTES: Final = 8 << 20
"""A longer log is begun anew, and one former log is kept: run folders often lie in memory."""


@dataclass(frozen=True)
class ServiceCommand:
    """What to run.

    Attributes:
        name: what people call it.
        module: Python module that is the service.
        arguments: its command line.
        log: file that its output is appended to; beside it, with `.1` at the end, the one before it.
        stop_deadline_s: how long it may take to stop by itself.
        settings_module: what looks at the same command line and starts nothing; see `check_all_settings`.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    log: Path
    stop_deadline_s: float
    settings_module: str = ""


@dataclass(frozen=True)
class RestartPolicy:
    """After a crash.

    Attributes:
        max_restarts: crashes in a row that are answered with a restart; None: all.
        first_delay_s: pause before the first restart; doubles each time.
        max_delay_s: longest pause.
        stable_s: a process that lived this long starts a new row.
    """

    max_restarts: int | None = 5
    first_delay_s: float = 0.5
    max_delay_s: float = 10.0
    stable_s: float = 60.0


class ServiceState(Enum):
    """Where a Service is.

    STOPPED ─start─▶ RUNNING ─exit─▶ BACKOFF ─pause over─▶ RUNNING
                       │ stop           │ too many in a row
                       ▼                ▼
                    STOPPED           FAILED
    """

    STOPPED = "stopped"
    RUNNING = "running"
    BACKOFF = "backoff"
    FAILED = "failed"


class Service:
    """One supervised process in a process group of its own, so that the terminal's Ctrl-C reaches only us."""

    def __init__(self, command: ServiceCommand, policy: RestartPolicy | None = None) -> None:
        self.command = command
        self.state = ServiceState.STOPPED
        self.num_crashes = 0
        self.crashes_in_row = 0
        self._policy = policy or RestartPolicy()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._restart_at_s = 0.0
        self._log_offset = 0

    @property
    def pid(self) -> int | None:
        """The running process."""
        return self._process.pid if self._process and self.state is ServiceState.RUNNING else None

    def start(self) -> None:
        """Starts the process."""
        assert self.state in (ServiceState.STOPPED, ServiceState.BACKOFF), f"started while {self.state.value}"
        self._bound_log()
        with self.command.log.open("ab") as log:
            self._log_offset = log.tell()
            self._process = subprocess.Popen(
                launch_arguments(self.command.module, self.command.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        self._started_s = time.perf_counter()
        self.state = ServiceState.RUNNING

    def watch(self) -> None:
        """Notices an exit and restarts when its pause is over; call it often.

        Raises:
            Unavailable: the process crashed too often; the text has its last words.
        """
        self._bound_log()
        now_s = time.perf_counter()
        if self.state is ServiceState.RUNNING and self.exit_code() is not None:
            if now_s - self._started_s >= self._policy.stable_s:
                self.crashes_in_row = 0
            self.num_crashes += 1
            self.crashes_in_row += 1
            if self._policy.max_restarts is not None and self.crashes_in_row > self._policy.max_restarts:
                self.state = ServiceState.FAILED
                raise Unavailable(f"{self.obituary()}\nIt was restarted {self._policy.max_restarts} times in vain.")
            delay_s = self._policy.first_delay_s * 2.0 ** min(self.crashes_in_row - 1, _MAX_DOUBLINGS)
            self._restart_at_s = now_s + min(delay_s, self._policy.max_delay_s)
            self.state = ServiceState.BACKOFF
        elif self.state is ServiceState.BACKOFF and now_s >= self._restart_at_s:
            self.start()

    def check_alive(self) -> None:
        """For a process that has not been ready yet: a restart would not mend why it ended.

        Raises:
            Unavailable: the process has ended; the text has its last words.
        """
        if self.exit_code() is not None:
            self.state = ServiceState.FAILED
            raise Unavailable(self.obituary())

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when one killed it."""
        assert self._process is not None, "never started"
        return self._process.poll()

    def terminate(self) -> None:
        """Asks the process to stop; no further restart."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        elif self.state is not ServiceState.FAILED:
            self.state = ServiceState.STOPPED

    def kill(self) -> None:
        """Ends the process and what it may have started, and waits for its end."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self.state is not ServiceState.FAILED:
            self.state = ServiceState.STOPPED

    @property
    def is_gone(self) -> bool:
        """No process is there."""
        return self._process is None or self._process.poll() is not None

    def last_words(self, num_lines: int = _LAST_WORDS) -> str:
        """The last lines the current process wrote."""
        with self.command.log.open("rb") as log:
            log.seek(max(self._log_offset, log.seek(0, os.SEEK_END) - 16384))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _bound_log(self) -> None:
        """Copies and empties: the process goes on appending to the file that it has open."""
        log = self.command.log
        try:
            if log.stat().st_size <= MAX_LOG_NBYTES:
                return
        except FileNotFoundError:
            return
        former = log.with_name(f"{log.name}.1")
        try:
            shutil.copyfile(log, former)
        except OSError:
            former.unlink(missing_ok=True)  # no room for both: what comes matters more than what was
        os.truncate(log, 0)
        self._log_offset = 0

    def ending(self) -> str:
        """How it ended, and where its log is."""
        code = self.exit_code()
        assert code is not None, "it lives"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"The {self.command.name} {how} (log: {self.command.log})."

    def obituary(self) -> str:
        """How it ended, and its last words."""
        words = self.last_words()
        return f"{self.ending()} Its last words:\n{words}" if words else self.ending()


def launch_arguments(module: str, arguments: tuple[str, ...]) -> list[str]:
    """The command line of a module that dies with this process; the current folder is not on its import path."""
    return [sys.executable, "-P", "-m", "promoe.cli.launch", str(os.getpid()), module, *arguments]
