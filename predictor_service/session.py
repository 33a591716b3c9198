"""One compute node's stream of events through one plug-in: checked, timed, counted. Knows no gRPC."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from predictor_service.predictor import Predictor
from promoe.errors import InternalError, InvalidInput
from promoe.hint import Hint, Observation, ObservedKind, StepStart
from promoe.model_spec import ModelSpec

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass
class SessionCounters:
    """Of one session, written by its thread only.

    Attributes:
        observations: that came to the predictor.
        refused_observations: not of the running step, or with hidden states that are no numbers.
        hints: that were made.
        predict_s: time spent in the plug-in.
    """

    observations: int = 0
    refused_observations: int = 0
    hints: int = 0
    predict_s: float = 0.0


class Session:
    """What one node tells, in order, from one thread.

    Args:
        node: the node's name for itself, for the log.
        spec: the model both ends have.
        predictor: makes the hints.
        max_rows: rows an observation may have.

    Attributes:
        max_rows: see above.

    Raises:
        InternalError: the plug-in failed.
    """

    def __init__(self, node: str, spec: ModelSpec, predictor: Predictor, max_rows: int) -> None:
        self.node = node
        self.counters = SessionCounters()
        self._spec = spec
        self._version = predictor.version
        self.max_rows = max_rows
        self._step = 0
        self._predictions = self._guarded(predictor.open_session)

    def begin_step(self, start: StepStart) -> None:
        """A forward pass begins.

        Raises:
            InvalidInput: steps do not count up.
            InternalError: the plug-in failed.
        """
        if start.step <= self._step:
            raise InvalidInput(f"Step {start.step} came after step {self._step}; steps count up.")
        self._step = start.step
        self._guarded(lambda: self._predictions.begin_step(start))

    def observe(self, observation: Observation) -> Sequence[Hint]:
        """The plug-in's hints; none for an observation that is refused.

        Raises:
            InvalidInput: an observation that cannot be one of this model.
            InternalError: the plug-in failed.
        """
        self._check(observation)
        hidden_RD = observation.hidden_RD
        if observation.step != self._step or (hidden_RD is not None and not np.isfinite(hidden_RD).all()):
            self.counters.refused_observations += 1
            return ()
        begin_s = time.perf_counter()
        hints = self._guarded(lambda: self._predictions.observe(observation))
        self.counters.predict_s += time.perf_counter() - begin_s
        self.counters.observations += 1
        self.counters.hints += len(hints)
        return hints

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """These requests are over; raises InternalError when the plug-in failed."""
        self._guarded(lambda: self._predictions.end_requests(request_ids))

    def _check(self, observation: Observation) -> None:
        spec, num_rows = self._spec, len(observation.rows)
        if observation.layer > spec.num_moe_layers:
            raise InvalidInput(
                f"An observation is of MoE layer {observation.layer}; {spec.name} has {spec.num_moe_layers}."
            )
        if num_rows > self.max_rows or any(row >= observation.num_tokens for row in observation.rows):
            raise InvalidInput(
                f"An observation has {num_rows} rows {observation.rows[: self.max_rows]} of {observation.num_tokens} "
                f"tokens; allowed: {self.max_rows} rows, each a token of the step."
            )
        hidden_RD = observation.hidden_RD
        wants_hidden = self._version.observed is not ObservedKind.NONE
        if hidden_RD is None and wants_hidden:
            raise InvalidInput(f"An observation lacks hidden states; {self._version.version} reads them.")
        if hidden_RD is not None and hidden_RD.shape != (num_rows, spec.hidden_size):
            raise InvalidInput(
                f"An observation's hidden states have the shape {hidden_RD.shape}; "
                f"expected ({num_rows}, {spec.hidden_size})."
            )
        for routing in observation.routings:
            ids_RK = routing.topk_ids_RK
            if routing.layer >= spec.num_moe_layers or (ids_RK.size and int(ids_RK.max()) >= spec.num_experts):
                raise InvalidInput(
                    f"A routing of MoE layer {routing.layer} names experts up to {ids_RK.max(initial=0)}; {spec.name} "
                    f"has {spec.num_moe_layers} MoE layers of {spec.num_experts} experts."
                )
            if num_rows and ids_RK.shape != (num_rows, spec.experts_per_token):
                raise InvalidInput(
                    f"A routing has the shape {ids_RK.shape}; expected ({num_rows}, {spec.experts_per_token})."
                )

    def _guarded(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except Exception as error:
            # The edge to plug-ins, which may be anybody's: the process and the other sessions go on.
            logger.error(
                "The predictor %s failed; the session of node %s ends.",
                self._version.version,
                self.node,
                exc_info=error,
            )
            raise InternalError(
                f"The predictor {self._version.version} failed ({type(error).__name__}); the predictor service's log "
                "has the details."
            ) from error
