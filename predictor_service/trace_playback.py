"""A recorded trace as a predictor would have seen it: the same observations in the same order as in the live node.

What a session gets of MoE layer l, by what its version wants:

    layer_input (+ routing)     hidden (+ routing of l - 1); after the last layer its output (+ routing of the last)
    router_input (+ routing)    hidden (+ routing of l)
    routing alone               routing of l

and of layers between those that it observes the routing with the next one.

Shapes: L MoE layers, R sampled rows (tokens), K experts per token, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from promoe.errors import InvalidInput
from promoe.hint import LayerRouting, Observation, ObservedKind, PredictorVersion, StepStart, is_observed
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader

_DEFAULT_MAX_ROWS: Final = 8
"""Rows that stand for a step where the trace recorded no hidden states, and so no rows."""


@dataclass(frozen=True)
class RecordedStep:
    """One step of a trace.

    Attributes:
        start: whose tokens there were.
        ended_request_ids: requests that ended before it.
        layers: one event per MoE layer.
    """

    start: StepStart
    ended_request_ids: tuple[str, ...]
    layers: tuple[LayerEvent, ...]

    @property
    def is_prefill(self) -> bool:
        """Part of its tokens are a prompt's."""
        return any(span.is_prefill for span in self.start.spans)


def recorded_step(events: Sequence[TraceEvent], num_layers: int) -> RecordedStep | None:
    """One step's events, the first of them its StepEvent; None if it lacks a layer."""
    first = events[0]
    assert isinstance(first, StepEvent), "a step begins with its StepEvent"
    layers = tuple(event for event in events if isinstance(event, LayerEvent))
    if [event.layer for event in layers] != list(range(num_layers)):
        return None
    return RecordedStep(StepStart(first.step, first.spans), first.ended_request_ids, layers)


def recorded_steps(trace: TraceReader, *, hidden: bool) -> Iterator[RecordedStep]:
    """The trace's whole steps; one that lacks a layer is left out."""
    for events in trace.steps(hidden=hidden):
        step = recorded_step(events, trace.header.model.num_moe_layers)
        if step is not None:
            yield step


def observations(step: RecordedStep, version: PredictorVersion) -> Iterator[Observation]:
    """In the order in which they would have come.

    Raises:
        InvalidInput: the trace lacks the hidden states that the version observes.
    """
    routings: list[LayerRouting] = []
    rows = step.layers[0].rows or _last_rows(step.start.num_tokens)
    for event in step.layers:
        observes = is_observed(event.layer, len(step.layers), version.observe_every)
        routing = LayerRouting(event.layer, event.topk_ids_TK[list(rows)])
        if observes and version.observed is ObservedKind.LAYER_INPUT:
            yield _observation(step, version, event.layer, event.layer_input_RD, rows, routings)
            routings = []
        if version.wants_routing:
            routings.append(routing)
        if observes and version.observed is not ObservedKind.LAYER_INPUT:
            yield _observation(step, version, event.layer, event.router_input_RD, rows, routings)
            routings = []
    if version.observed is ObservedKind.LAYER_INPUT:
        last_RD = step.layers[-1].last_output_RD
        if last_RD is not None:
            yield _observation(step, version, len(step.layers), last_RD, rows, routings)


def _observation(
    step: RecordedStep,
    version: PredictorVersion,
    layer: int,
    hidden_RD: np.ndarray | None,
    rows: tuple[int, ...],
    routings: list[LayerRouting],
) -> Observation:
    wants_hidden = version.observed is not ObservedKind.NONE
    if wants_hidden and hidden_RD is None:
        raise InvalidInput(
            f"The trace holds no {version.observed.value}, which {version.version} observes; record it with them."
        )
    return Observation(
        step=step.start.step,
        layer=layer,
        rows=rows,
        num_tokens=step.start.num_tokens,
        hidden_RD=hidden_RD if wants_hidden else None,
        routings=tuple(routings),
    )


def _last_rows(num_tokens: int) -> tuple[int, ...]:
    return tuple(range(max(num_tokens - _DEFAULT_MAX_ROWS, 0), num_tokens))
