"""Puts a predictor's hints into a recorded step, in place of those that were recorded."""

from collections.abc import Iterator, Sequence

from predictor_service.predictor import PredictorSession
from predictor_service.trace_playback import observations, recorded_step
from promoe.hint import Hint, ObservedKind, PredictorVersion
from promoe.trace_events import HintEvent, HintFate, LayerEvent, TraceEvent


def with_hints(
    events: Sequence[TraceEvent], session: PredictorSession, version: PredictorVersion, num_layers: int
) -> Iterator[TraceEvent]:
    """One step's events with the hints that the session gives for it.

    A hint stands where it could have been noticed if predicting took no time: before the routing of the layer whose
    input was observed, or behind that of the layer whose routing was. A step that lacks layers gets none.

    Raises:
        InvalidInput: the trace lacks the hidden states that the version observes.
    """
    step = recorded_step(events, num_layers)
    hints: dict[int, list[Hint]] = {}
    if step is not None:
        if step.ended_request_ids:
            session.end_requests(step.ended_request_ids)
        session.begin_step(step.start)
        is_before = version.observed is ObservedKind.LAYER_INPUT
        for layer, observation in observations(step, version):
            # Place l is before the routing of layer l.
            hints.setdefault(layer if is_before else layer + 1, []).extend(session.observe(observation))
    at_s = 0.0
    for event in events:
        if isinstance(event, HintEvent):
            continue
        if isinstance(event, LayerEvent):
            yield from _events_of(hints.get(event.layer, []), event.at_s)
        yield event
        at_s = event.at_s
    yield from _events_of(hints.get(num_layers, []), at_s)


def _events_of(hints: Sequence[Hint], at_s: float) -> Iterator[HintEvent]:
    return (HintEvent(at_s, hint, HintFate.TAKEN, latency_s=0.0) for hint in hints)
