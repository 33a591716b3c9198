"""Shows people how far packing is: a bar on a terminal, a line every ten percent elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Final, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from expert_store.pack.progress import PackProgress

_LINES_PER_PHASE: Final = 10
_SECONDS_PER_LINE: Final = 0.5


class LineProgress:
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = Lock()
        self._title = ""
        self._total_nbytes = 0
        self._num_layers = 0
        self._done_nbytes = 0
        self._done_layers = 0
        self._said_tenths = 0
        self._said_s = 0.0
        self._started_s = 0.0

    def begin(self, title: str, total_nbytes: int, num_layers: int) -> None:
        """Says the title and the size."""
        with self._lock:
            self._title, self._total_nbytes, self._num_layers = title, total_nbytes, num_layers
            self._done_nbytes = self._done_layers = self._said_tenths = 0
            self._said_s = self._started_s = time.perf_counter()
            self._say(f"{title}: {num_layers} layers, {total_nbytes / 1e9:.2f} GB")

    def advance(self, nbytes: int) -> None:
        """Says so at every tenth, but not more often than twice a second."""
        with self._lock:
            self._done_nbytes += nbytes
            tenths = self._done_nbytes * _LINES_PER_PHASE // max(self._total_nbytes, 1)
            now_s = time.perf_counter()
            if tenths <= self._said_tenths or now_s - self._said_s < _SECONDS_PER_LINE:
                return
            self._said_tenths, self._said_s = tenths, now_s
            rate = self._done_nbytes / (now_s - self._started_s)
            self._say(
                f"{self._title}: {tenths * 100 // _LINES_PER_PHASE} %, {self._done_layers} of {self._num_layers} "
                f"layers, {self._done_nbytes / 1e9:.2f} of {self._total_nbytes / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
            )

    def finish_layer(self) -> None:
        """Counts it for the next line."""
        with self._lock:
            self._done_layers += 1

    def note(self, sentence: str) -> None:
        """Says the sentence."""
        with self._lock:
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        self._stream.write(f"{sentence}\n")
        self._stream.flush()


class BarProgress:
    """A bar per phase on a terminal, with layers, bytes and rate."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._lock = Lock()
        self._done_layers = 0

    def begin(self, title: str, total_nbytes: int, num_layers: int) -> None:
        """Adds a bar."""
        with self._lock:
            self._done_layers = 0
            self._task = self._bars.add_task(title, total=total_nbytes, layers=0, num_layers=num_layers)

    def advance(self, nbytes: int) -> None:
        """Moves the last bar."""
        self._bars.advance(self._task, nbytes)

    def finish_layer(self) -> None:
        """Counts up beside the last bar."""
        with self._lock:
            self._done_layers += 1
            self._bars.update(self._task, layers=self._done_layers)

    def note(self, sentence: str) -> None:
        """Prints above the bars."""
        self._bars.console.print(sentence, highlight=False, markup=False)


@contextmanager
def shown_progress() -> Iterator[PackProgress]:
    """What fits stderr: bars if it is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield LineProgress(sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[layers]}/{task.fields[num_layers]} layers"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield BarProgress(bars)
