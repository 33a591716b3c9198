"""`oracle`: knows the routing beforehand, from a trace of the same requests in the same order: what prediction could
gain at most. For benchmarks.

Requests are matched by the order in which they appear, tokens by their place in their request: so the steps may be cut
otherwise than they were when the trace was recorded.
Shapes: L MoE layers, T tokens of one request, K experts per token, E experts.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from predictor_service.predictor import PredictorSource
from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.ranking import HintTarget, target_of
from predictor_service.predictors.step_state import StepState
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import Hint, IdArray, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader

logger = logging.getLogger(__name__)

VERSION: Final = PredictorVersion(
    version="oracle@1",
    predictor="oracle",
    observed=ObservedKind.NONE,
    lookaheads=(2,),
    calibrated=True,
    wants_routing=True,  # read for when to speak, not for what to say
)


class OraclePredictor:
    """Holds every recorded request's routing; raises ModelNotFound, InvalidInput or ModelMismatch for its trace."""

    def __init__(self, source: PredictorSource) -> None:
        if source.artifact is None:
            raise ModelNotFound("The oracle needs a recorded trace; give its path with predictor.artifact.")
        self.version = at_lookahead(VERSION, source)
        self._spec = source.spec
        self._requests = read_routings(source.artifact, source.spec)

    def open_session(self) -> "OracleSession":
        """See Predictor. Every session starts at the trace's first request."""
        return OracleSession(self._spec, self._requests, self.version)


def read_routings(path: Path, spec: ModelSpec) -> tuple[IdArray, ...]:
    """(L, T, K) of each request, in the order in which they appear; steps without all layers end the trace."""
    trace = TraceReader(path)
    if trace.header.model.fingerprint != spec.fingerprint:
        raise ModelMismatch(
            f"The trace {path} is of {trace.header.model.name} with fingerprint {trace.header.model.fingerprint}; "
            f"{spec.name} has fingerprint {spec.fingerprint}."
        )
    if trace.summary.dropped_steps:
        raise InvalidInput(f"The trace {path} lacks {trace.summary.dropped_steps} steps; an oracle needs all.")
    parts: dict[str, list[IdArray]] = {}
    for events in trace.steps(hidden=False):
        topk_ids_LTK = _step_routing(events, spec)
        if topk_ids_LTK is None:
            break
        start = events[0]
        assert isinstance(start, StepEvent), "a step begins with its event"
        row = 0
        for span in start.spans:
            parts.setdefault(span.request_id, []).append(topk_ids_LTK[:, row : row + span.num_tokens])
            row += span.num_tokens
    return tuple(np.concatenate(pieces, axis=1) for pieces in parts.values())


def _step_routing(events: Sequence[TraceEvent], spec: ModelSpec) -> IdArray | None:
    """(L, T, K) of one step, or None when a layer is missing, as at the end of a trace that was cut."""
    by_layer = {event.layer: event.topk_ids_TK for event in events if isinstance(event, LayerEvent)}
    if set(by_layer) != set(range(spec.num_moe_layers)):
        return None
    return np.stack([by_layer[layer] for layer in range(spec.num_moe_layers)])


class OracleSession:
    """Reads along in the trace while one node serves the same requests."""

    def __init__(self, spec: ModelSpec, requests: tuple[IdArray, ...], version: PredictorVersion) -> None:
        self._spec = spec
        self._requests = requests
        self._version = version
        self._state = StepState()
        self._num_seen = 0
        self._index: dict[str, int] = {}
        # Tokens of each request before the running step.
        self._position: dict[str, int] = {}

    def begin_step(self, start: StepStart) -> None:
        """See PredictorSession."""
        if self._state.start is not None:
            for span in self._state.start.spans:
                if span.request_id in self._position:
                    self._position[span.request_id] += span.num_tokens
        self._state.begin(start)
        for span in start.spans:
            if span.request_id not in self._index:
                self._index[span.request_id] = self._num_seen
                self._position[span.request_id] = 0
                self._num_seen += 1

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """See PredictorSession."""
        (lookahead,) = self._version.lookaheads
        target = target_of(observation, lookahead, self._spec.num_moe_layers)
        is_this_prefill = self._state.is_prefill and target.step == observation.step
        if is_this_prefill or observation.layer >= self._spec.num_moe_layers:
            return ()
        experts = self._needed(observation, target)
        if not len(experts):
            return ()
        hint = Hint(
            step=target.step,
            layer=target.layer,
            observed_step=observation.step,
            observed_layer=observation.layer,
            experts=experts,
            scores=np.ones(len(experts), np.float32),
            num_expected=len(experts),
            version=self._version.version,
        )
        return (hint,)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """See PredictorSession."""
        for request_id in request_ids:
            self._index.pop(request_id, None)
            self._position.pop(request_id, None)

    def _needed(self, observation: Observation, target: HintTarget) -> IdArray:
        """Every expert that a token of the target's step was routed to; none where the trace has ended."""
        assert self._state.start is not None, "a step has begun"
        needed: list[IdArray] = []
        for span in self._state.start.spans:
            index = self._index.get(span.request_id)
            if index is None or index >= len(self._requests):
                continue
            begin = self._position[span.request_id]
            end = begin + span.num_tokens
            if target.step != observation.step:
                begin, end = end, end + 1
            needed.append(self._requests[index][target.layer, begin:end].reshape(-1))
        return np.unique(np.concatenate(needed)) if needed else np.empty(0, np.uint16)
