"""Shows people how far the fill is: a bar on a terminal, a line every ten percent elsewhere."""

import logging
import sys
from typing import Final

logger = logging.getLogger(__name__)

_LINES: Final = 10


class FillProgress:
    """Progress of one fill.

    Args:
        total_nbytes: bytes of all blobs.
    """

    def __init__(self, total_nbytes: int) -> None:
        self._total_nbytes = total_nbytes
        self._tenths = 0
        self._bar = _TerminalBar(total_nbytes) if sys.stderr.isatty() else None

    def update(self, filled_nbytes: int) -> None:
        """Takes the bytes filled so far."""
        if self._bar is not None:
            self._bar.update(filled_nbytes)
            return
        tenths = filled_nbytes * _LINES // self._total_nbytes
        if tenths > self._tenths:
            self._tenths = tenths
            logger.info("Filled %d%% of %.1f MB.", tenths * 100 // _LINES, self._total_nbytes / 1e6)

    def close(self) -> None:
        """Leaves the terminal as it is, wherever the fill stopped."""
        if self._bar is not None:
            self._bar.close()


class _TerminalBar:
    def __init__(self, total_nbytes: int) -> None:
        # Only a terminal pays for importing rich.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("Filling the arena"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("fill", total=total_nbytes)

    def update(self, filled_nbytes: int) -> None:
        # An adopted arena needs no fill, and then shows no bar.
        self._progress.start()
        self._progress.update(self._task, completed=filled_nbytes)
        if self._progress.finished:
            self._progress.stop()

    def close(self) -> None:
        self._progress.stop()
