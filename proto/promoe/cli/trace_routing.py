"""A trace's routing as tables of tokens, prefill and decode apart.

Shapes: N tokens of one phase in the order they were computed, L MoE layers, K experts per token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from promoe.hint import IdArray
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenRouting:
    """All tokens of one phase.

    Attributes:
        topk_ids_LNK: routed experts.
        request_N: which request a token belongs to, counted from 0.
    """

    topk_ids_LNK: IdArray
    request_N: IndexArray

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.request_N)

    def successors(self) -> tuple[IndexArray, IndexArray]:
        """Pairs of neighbours: places of tokens, and of the token before each in its own request."""
        order = np.argsort(self.request_N, kind="stable")
        is_same = self.request_N[order[1:]] == self.request_N[order[:-1]]
        return order[1:][is_same], order[:-1][is_same]


@dataclass
class PhaseTotals:
    """What the expert cache did in one phase; a step with any prefill in it is prefill."""

    steps: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    stall_s: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """None without accesses."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else None


@dataclass
class _PhaseTables:
    ids_of_layers: list[list[IdArray]] = field(default_factory=list)
    requests: list[IndexArray] = field(default_factory=list)

    def finish(self, num_layers: int, experts_per_token: int) -> TokenRouting:
        if not self.requests:
            return TokenRouting(np.zeros((num_layers, 0, experts_per_token), np.uint16), np.zeros(0, np.int64))
        topk_ids_LNK = np.stack([np.concatenate(ids) for ids in zip(*self.ids_of_layers, strict=True)])
        return TokenRouting(topk_ids_LNK, np.concatenate(self.requests))


class RoutingCollector:
    """Takes a trace's events in order; steps without all their layers are left out of the tables.

    Attributes:
        prefill_totals, decode_totals: of all steps.
        accesses: per layer and step, in order: whether it was prefill, and the experts that it needed.
        num_requests: seen so far.
        end_s: of the last layer.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.prefill_totals = PhaseTotals()
        self.decode_totals = PhaseTotals()
        self.accesses: list[list[tuple[bool, tuple[int, ...]]]] = [[] for _ in range(num_layers)]
        self.end_s = 0.0
        self._requests: dict[str, int] = {}
        self._step: StepEvent | None = None
        self._layers: list[IdArray] = []
        self._prefill = _PhaseTables()
        self._decode = _PhaseTables()

    @property
    def num_requests(self) -> int:
        """Documents, that is."""
        return len(self._requests)

    def add_all(self, events: Iterable[TraceEvent]) -> None:
        """The next events."""
        for event in events:
            if isinstance(event, StepEvent):
                self._begin_step(event)
            elif isinstance(event, LayerEvent):
                self._add_layer(event)

    def routing(self, experts_per_token: int) -> tuple[TokenRouting, TokenRouting]:
        """Prefill's and decode's tokens."""
        return (
            self._prefill.finish(self.num_layers, experts_per_token),
            self._decode.finish(self.num_layers, experts_per_token),
        )

    def _begin_step(self, event: StepEvent) -> None:
        self._step = event
        self._layers = []
        for span in event.spans:
            self._requests.setdefault(span.request_id, len(self._requests))
        self._totals(event).steps += 1

    def _totals(self, step: StepEvent) -> PhaseTotals:
        return self.prefill_totals if _has_prefill(step) else self.decode_totals

    def _add_layer(self, event: LayerEvent) -> None:
        if self._step is None:
            return
        totals = self._totals(self._step)
        totals.hits += len(event.hits)
        totals.misses += len(event.misses)
        totals.late += len(event.late)
        totals.stall_s += event.stall_s
        self.end_s = max(self.end_s, event.end_s)
        if event.layer < self.num_layers:
            self.accesses[event.layer].append((_has_prefill(self._step), event.hits + event.misses))
        if event.layer == len(self._layers):
            self._layers.append(event.topk_ids_TK)
            if len(self._layers) == self.num_layers:
                self._file_step(self._step)

    def _file_step(self, step: StepEvent) -> None:
        row = 0
        for span in step.spans:
            tables = self._prefill if span.is_prefill else self._decode
            tables.ids_of_layers.append([ids_TK[row : row + span.num_tokens] for ids_TK in self._layers])
            tables.requests.append(np.full(span.num_tokens, self._requests[span.request_id], np.int64))
            row += span.num_tokens


def _has_prefill(step: StepEvent) -> bool:
    return any(span.is_prefill for span in step.spans)
