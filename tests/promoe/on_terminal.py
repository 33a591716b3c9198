"""Commands on a pseudo-terminal, as a person has them."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

DEADLINE_S: Final = 30.0


class Terminal:
    """A command on a pseudo-terminal that is its controlling one, as in a person's shell."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = b""

    @property
    def screen(self) -> str:
        """Everything that was written so far."""
        return self._written.decode(errors="replace")

    def send(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, words: str, times: int = 1) -> None:
        """Reads until the words are there so many times."""
        end_s = time.perf_counter() + DEADLINE_S
        while self.screen.count(words) < times:
            assert self._read(end_s - time.perf_counter()), self.screen

    def press_until(self, key: str, words: str, times: int) -> None:
        """Presses a key, and again each second, until the words are there so many times.

        CPython's line editing misses a signal that comes between the echo of a key and its select() for the next one.
        """
        end_s = time.perf_counter() + DEADLINE_S
        self.send(key)
        while self.screen.count(words) < times:
            if not self._read(1.0):
                assert time.perf_counter() < end_s, self.screen
                self.send(key)

    def _read(self, timeout_s: float) -> bool:
        """What comes next; False when nothing came."""
        if not select.select([self._fd], [], [], max(0.0, timeout_s))[0]:
            return False
        self._written += os.read(self._fd, 4096)
        return True


@contextmanager
def on_terminal(*arguments: str) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    # The first terminal that a session's leader opens becomes its controlling one: Ctrl-C makes SIGINT.
    code = "import os; os.open(os.ttyname(0), os.O_RDWR); from promoe.cli.app import main; main()"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=environment,
    )
    os.close(theirs)
    try:
        yield Terminal(ours), process
    finally:
        process.kill()
        process.wait()
        os.close(ours)
