"""Keys as they are pressed, without Enter."""

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Self

from promoe.cli.stop_signals import StopSignals


class Keyboard:
    """While entered, the terminal on standard input hands keys over at once and does not echo them.

    Where standard input is no terminal there are no keys.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._former: list[int | list[bytes | int]] = []

    def wait(self, seconds: float, stop: StopSignals) -> str | None:
        """The first key that is pressed; None when the time is over or a signal came."""
        end_s = time.perf_counter() + seconds
        while not stop.asked and (remaining_s := end_s - time.perf_counter()) > 0:
            if self._fd is None:
                stop.wait(remaining_s)
            elif select.select([self._fd, stop.fileno()], [], [], remaining_s)[0] == [self._fd]:
                key = os.read(self._fd, 1)
                if key == b"":  # the terminal is gone
                    self._fd = None
                else:
                    return key.decode(errors="replace")
        return None

    def __enter__(self) -> Self:
        if self._fd is not None:
            self._former = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._former)
