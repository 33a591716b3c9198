"""Shows people how far training is: a bar on a terminal, a line per epoch everywhere."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from predictor_service.training.fit import FitProgress, Measured
from predictor_service.training.train import sentence_of


def epoch_line(epoch: int, measured: Measured, lookaheads: Sequence[int]) -> str:
    """For example `epoch 3: held-out loss 0.2571, recall@k 0.811 at 1, 0.784 at 2`."""
    return (
        f"epoch {epoch + 1}: held-out loss {measured.loss:.4f}, recall@k {sentence_of(lookaheads, measured.recall_A)}"
    )


class LineProgress:
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO, lookaheads: Sequence[int]) -> None:
        self._stream = stream
        self._lookaheads = lookaheads

    def advance(self, epoch: int, num_tokens: int) -> None:
        """Not worth a line."""

    def finish_epoch(self, epoch: int, measured: Measured) -> None:
        """Says how good it is."""
        self._stream.write(epoch_line(epoch, measured, self._lookaheads) + "\n")
        self._stream.flush()


class BarProgress:
    """A bar of tokens per epoch; how many there are is known from the second epoch on."""

    def __init__(self, bars: Progress, lookaheads: Sequence[int]) -> None:
        self._bars = bars
        self._lookaheads = lookaheads
        self._task: TaskID | None = None
        self._num_tokens = 0
        self._total: int | None = None

    def advance(self, epoch: int, num_tokens: int) -> None:
        """Moves the bar."""
        if self._task is None:
            self._num_tokens = 0
            self._task = self._bars.add_task(f"epoch {epoch + 1}", total=self._total)
        self._num_tokens += num_tokens
        self._bars.advance(self._task, num_tokens)

    def finish_epoch(self, epoch: int, measured: Measured) -> None:
        """Puts a line in the bar's place."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task, self._total = None, self._num_tokens
        self._bars.console.print(epoch_line(epoch, measured, self._lookaheads), highlight=False, markup=False)


@contextmanager
def shown_progress(lookaheads: Sequence[int]) -> Iterator[FitProgress]:
    """What fits stderr: a bar if it is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield LineProgress(sys.stderr, lookaheads)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        yield BarProgress(bars, lookaheads)
