"""Puts a predictor's hints into a recorded step, in place of those that were recorded."""

from collections.abc import Iterator, Sequence
from typing import Final

from predictor_service.predictor import PredictorSession
from predictor_service.trace_playback import observations, recorded_step
from promoe.hint import Hint, ObservedKind, PredictorVersion
from promoe.trace_events import HintEvent, HintFate, LayerEvent, TraceEvent

_AFTER_S: Final = 1e-6
"""A hint that was made from a layer's routing stands this much behind it, so that it is not taken for earlier."""


def with_hints(
    events: Sequence[TraceEvent], session: PredictorSession, version: PredictorVersion, num_layers: int
) -> Iterator[TraceEvent]:
    """One step's events with the hints that the session gives for it.

    A hint stands where it could have been noticed if predicting took no time: at the beginning of the layer whose input
    was observed, or right behind the routing of the layer whose router's input was. A step that lacks layers gets none.

    Raises:
        InvalidInput: the trace lacks the hidden states that the version observes.
    """
    step = recorded_step(events, num_layers)
    hints: dict[int, Sequence[Hint]] = {}
    if step is not None:
        if step.ended_request_ids:
            session.end_requests(step.ended_request_ids)
        session.begin_step(step.start)
        hints = {observation.layer: session.observe(observation) for observation in observations(step, version)}
    is_before = version.observed is ObservedKind.LAYER_INPUT
    begin_s = events[0].at_s
    for event in events:
        if isinstance(event, HintEvent):
            continue
        if not isinstance(event, LayerEvent):
            yield event
            continue
        if is_before:
            yield from _events_of(hints.get(event.layer, ()), begin_s)
        yield event
        if not is_before:
            yield from _events_of(hints.get(event.layer, ()), event.at_s + _AFTER_S)
        begin_s = event.end_s
    yield from _events_of(hints.get(num_layers, ()), begin_s)


def _events_of(hints: Sequence[Hint], at_s: float) -> Iterator[HintEvent]:
    return (HintEvent(at_s, hint, HintFate.TAKEN, latency_s=0.0) for hint in hints)
