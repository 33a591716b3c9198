"""SIGINT, SIGTERM and SIGHUP as a wish to stop that a loop looks at, instead of an exception anywhere."""

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Final, Self

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, counts the signals; the second one means *at once*. Main thread only."""

    def __init__(self) -> None:
        self.count = 0
        self._former: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """Somebody wants us to stop."""
        return self.count > 0

    @property
    def asked_twice(self) -> bool:
        """Somebody wants us to stop without waiting for anything."""
        return self.count > 1

    def wait(self, seconds: float) -> None:
        """Sleeps, but wakes at a signal."""
        if select.select([self._read_fd], [], [], seconds)[0]:
            os.read(self._read_fd, 64)

    def fileno(self) -> int:
        """Readable when a signal has come since the last `wait`, to be waited for together with something else."""
        return self._read_fd

    def __enter__(self) -> Self:
        # A signal's handler may run anywhere in the main thread: it only counts and writes to a pipe.
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave us it takes back
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._write_fd, b"!")
