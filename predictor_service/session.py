"""One compute node's stream of events through one plug-in: checked, timed, counted. Knows no gRPC."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from predictor_service.predictor import AdoptingSession, Predictor
from promoe.errors import InternalError, InvalidInput
from promoe.hint import Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

MOST_ANNOUNCED: Final = 8
"""Versions that a node may still sample for: it reads a welcome a step late, and changes may follow each other."""


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
        active: what makes the hints of steps that begin now; a plug-in's one version after the other.
        max_rows: rows an observation may have.

    Attributes:
        max_rows: see above.

    Raises:
        InternalError: the plug-in failed.
    """

    def __init__(self, node: str, spec: ModelSpec, active: Callable[[], Predictor], max_rows: int) -> None:
        self.node = node
        self.counters = SessionCounters()
        self._spec = spec
        self.max_rows = max_rows
        self._active = active
        self._newest = self._predictor = active()
        self._version = self._predictor.version
        # What the node was told of lately, by name: it samples a step as the welcome says that it has read.
        self._announced = {self._version.version: self._predictor}
        self._step = 0
        self._predictions = self._guarded(self._predictor.open_session)

    @property
    def announced(self) -> PredictorVersion:
        """What the node was told of last."""
        return self._newest.version

    def begin_step(self, start: StepStart) -> PredictorVersion | None:
        """A forward pass begins, predicted by the version that the node samples it for.

        Returns:
            A version that became active since, for the node to be told of; None where there is none.

        Raises:
            InvalidInput: steps do not count up, or it is sampled for a version that was not announced.
            InternalError: the plug-in failed.
        """
        if start.step <= self._step:
            raise InvalidInput(f"Step {start.step} came after step {self._step}; steps count up.")
        predictor = self._announced.get(start.version) if start.version else self._newest
        if predictor is None:
            raise InvalidInput(
                f"Step {start.step} is sampled for {start.version}; announced were {', '.join(self._announced)}."
            )
        self._step = start.step
        if predictor is not self._predictor:
            self._go_on_with(predictor)
        self._guarded(lambda: self._predictions.begin_step(start))
        active = self._active()
        return None if active is self._newest else self._announce(active)

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

    def _go_on_with(self, predictor: Predictor) -> None:
        """Between two steps; what the former version remembers of the requests goes on where kinds allow."""
        former = self._predictions
        self._predictor, self._version = predictor, predictor.version
        self._predictions = self._guarded(predictor.open_session)
        adopting = self._predictions
        if isinstance(adopting, AdoptingSession):
            self._guarded(lambda: adopting.adopt(former))

    def _announce(self, active: Predictor) -> PredictorVersion:
        self._newest = active
        self._announced.pop(active.version.version, None)
        self._announced[active.version.version] = active
        for version in list(self._announced)[:-MOST_ANNOUNCED]:
            if version != self._version.version:
                del self._announced[version]
        return active.version

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
