"""Steps that two versions were compared on, and how they become documents' differences.

Steps of one request are alike, so the document, not the step, is what is counted. A step of several requests counts
for one of them only: no step counts twice.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from predictor_service.shadow.tally import StepComparison

MOST_OPEN_DOCUMENTS: Final = 1024
"""Beyond it the oldest is finished: its end may never be told."""

_MOST_FINISHED_NAMES: Final = 8192


@dataclass
class _OpenDocument:
    steps: int = 0
    total: float = 0.0

    @property
    def difference(self) -> float:
        return self.total / self.steps


class DocumentDifferences:
    """Gathers the steps of each document.

    Args:
        max_steps: of one document that count; then it is finished.
    """

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._open: OrderedDict[str, _OpenDocument] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()

    def add(self, comparison: StepComparison) -> list[float]:
        """Takes a step in; returns the mean differences of documents that it finished."""
        name = next((name for name in comparison.request_ids if name not in self._finished), None)
        if name is None:
            return []
        document = self._open.setdefault(name, _OpenDocument())
        document.steps += 1
        document.total += comparison.shadow_score - comparison.active_score
        if document.steps >= self._max_steps:
            return self.end([name])
        return self.end([next(iter(self._open))]) if len(self._open) > MOST_OPEN_DOCUMENTS else []

    def end(self, request_ids: Iterable[str]) -> list[float]:
        """These requests are over; returns the differences of those that had steps."""
        differences: list[float] = []
        for name in request_ids:
            document = self._open.pop(name, None)
            if document is not None:
                differences.append(document.difference)
                self._finished[name] = None
        while len(self._finished) > _MOST_FINISHED_NAMES:
            self._finished.popitem(last=False)
        return differences
