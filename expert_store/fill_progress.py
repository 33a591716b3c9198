"""Shows people how far the fill is: a bar on a terminal, a line every ten percent elsewhere."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
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

    def shown(self) -> AbstractContextManager[object]:
        """Keeps the bar on the terminal while entered."""
        return self._bar.progress if self._bar else nullcontext()

    def update(self, filled_nbytes: int) -> None:
        """Takes the bytes filled so far."""
        if self._bar is not None:
            self._bar.update(filled_nbytes)
            return
        tenths = filled_nbytes * _LINES // self._total_nbytes
        if tenths > self._tenths:
            self._tenths = tenths
            logger.info("Filled %d%% of %.1f MB.", tenths * 100 // _LINES, self._total_nbytes / 1e6)


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

        self.progress = Progress(
            TextColumn("Filling the arena"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self.progress.add_task("fill", total=total_nbytes)

    def update(self, filled_nbytes: int) -> None:
        self.progress.update(self._task, completed=filled_nbytes)
        if self.progress.finished:
            self.progress.stop()
