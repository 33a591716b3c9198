"""A trace as a replay wants it, step by step: what compute did, how long it took without waiting, what was hinted.

Shapes: T tokens, K experts per token.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compute_node.replay.belady import Visit
from compute_node.slots import CacheGeometry
from compute_node.step_ledger import Phase
from promoe.errors import InvalidInput
from promoe.hint import IdArray, StepStart
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader
from promoe.trace_header import TraceHeader


@dataclass(frozen=True, eq=False)
class RecordedLayer:
    """One MoE layer's turn.

    Attributes:
        event: as recorded.
        needed: the distinct experts, in the order the experts function asks for them.
        lead_s: compute from the layer's beginning until its routing was known.
        experts_s: compute of its experts.
    """

    event: LayerEvent
    needed: tuple[int, ...]
    lead_s: float
    experts_s: float


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One forward pass.

    Attributes:
        start: its number and whose tokens it has.
        began_s: on the trace's clock.
        layers: in order.
        tail_s: from the last layer's end to the next step, sampling included.
        events: hints, loads and layers as they were noticed.
        phase: prefill when any of its tokens is one of a prompt.
        link_bytes_per_s: what the cache reckoned with.
    """

    start: StepStart
    began_s: float
    layers: tuple[RecordedLayer, ...]
    tail_s: float
    events: tuple[TraceEvent, ...]
    phase: Phase
    link_bytes_per_s: float

    @property
    def compute_s(self) -> float:
        """What the step would take with all experts resident."""
        return self.tail_s + sum(layer.lead_s + layer.experts_s for layer in self.layers)

    @property
    def recorded_s(self) -> float:
        """What it took."""
        return self.compute_s + sum(layer.event.stall_s for layer in self.layers)


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """A whole trace in memory, without hidden states."""

    header: TraceHeader
    geometry: CacheGeometry
    steps: tuple[RecordedStep, ...]

    @classmethod
    def read(cls, reader: TraceReader) -> "RecordedRun":
        """Raises InvalidInput for a trace with gaps, or of no whole step."""
        if reader.summary.dropped_steps:
            raise InvalidInput(
                f"{reader.path} lacks {reader.summary.dropped_steps} steps that its reader was too slow for; only a "
                "trace without gaps can be replayed."
            )
        run = cls.of(reader.header, reader.steps(hidden=False))
        if not run.steps:
            raise InvalidInput(f"{reader.path} has no whole step to replay.")
        return run

    @classmethod
    def of(cls, header: TraceHeader, steps: Iterable[Sequence[TraceEvent]]) -> "RecordedRun":
        """From events by step, each list beginning with its StepEvent; steps that broke off are left out."""
        model, shape = header.model, header.shape
        geometry = CacheGeometry(
            model.num_moe_layers, model.num_experts, shape.slots_per_layer, model.expert_nbytes, model.experts_per_token
        )
        whole = [step for step in map(_step_of, steps) if len(step.layers) == geometry.num_layers]
        return cls(header, geometry, tuple(_with_tails(whole)))

    @property
    def num_accesses(self) -> int:
        """Experts that layers asked for."""
        return sum(len(layer.needed) for step in self.steps for layer in step.layers)

    def hints(self) -> Iterable[HintEvent]:
        """Those that came in order, and in time or not."""
        for step in self.steps:
            for event in step.events:
                if isinstance(event, HintEvent) and event.fate in (HintFate.TAKEN, HintFate.LATE):
                    yield event

    def visits(self, layer: int | None = None) -> list[Visit]:
        """What the optimum is computed of: one layer's visits, or all, with experts numbered over all layers."""
        width = self.geometry.num_experts
        return [
            Visit(frozenset(one.event.layer * width + expert for expert in one.needed), step.phase is Phase.DECODE)
            for step in self.steps
            for one in (step.layers if layer is None else step.layers[layer : layer + 1])
        ]


def needed_experts(topk_ids_TK: IdArray) -> tuple[int, ...]:
    """The distinct experts in the order the experts function asks for them: a single token's as routed, else by id."""
    if topk_ids_TK.shape[0] == 1:
        routed = topk_ids_TK[0].tolist()
        if len(set(routed)) == len(routed):
            return tuple(routed)
    return tuple(np.unique(topk_ids_TK).tolist())


def _step_of(events: Sequence[TraceEvent]) -> RecordedStep:
    first = events[0]
    assert isinstance(first, StepEvent), "a step's events begin with it"
    is_prefill = any(span.is_prefill for span in first.spans)
    former_s = first.at_s
    layers: list[RecordedLayer] = []
    for event in events[1:]:
        if isinstance(event, LayerEvent):
            experts_s = max(0.0, event.end_s - event.at_s - event.stall_s)
            lead_s = max(0.0, event.at_s - former_s)
            layers.append(RecordedLayer(event, needed_experts(event.topk_ids_TK), lead_s, experts_s))
            former_s = event.end_s
    return RecordedStep(
        start=StepStart(first.step, first.spans, first.ended_request_ids),
        began_s=first.at_s,
        layers=tuple(layers),
        tail_s=0.0,
        events=tuple(event for event in events[1:] if isinstance(event, HintEvent | LoadEvent | LayerEvent)),
        phase=Phase.PREFILL if is_prefill else Phase.DECODE,
        link_bytes_per_s=first.link_bytes_per_s,
    )


def _with_tails(steps: Sequence[RecordedStep]) -> list[RecordedStep]:
    """The time from each step's last layer to the next step; where nobody's next token was waiting, what is usual."""
    tails_s: list[float | None] = []
    for step, following in itertools.pairwise(steps):
        before = {span.request_id for span in step.start.spans}
        goes_on = any(span.request_id in before for span in following.start.spans)
        is_next = following.start.step == step.start.step + 1
        tails_s.append(max(0.0, following.began_s - step.layers[-1].event.end_s) if goes_on and is_next else None)
    if steps:
        tails_s.append(None)
    known_s = [tail_s for tail_s in tails_s if tail_s is not None]
    usual_s = statistics.median(known_s) if known_s else 0.0
    return [
        replace(step, tail_s=usual_s if tail_s is None else tail_s) for step, tail_s in zip(steps, tails_s, strict=True)
    ]
