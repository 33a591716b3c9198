"""One compute node's stream of events through one plug-in: checked, timed, counted. Knows no gRPC."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Final, TypeVar

import numpy as np

from predictor_service.lineup import Lineup
from predictor_service.predictor import AdoptingSession, Predictor, PredictorSession
from predictor_service.step_share import StepShare
from promoe.errors import InternalError, InvalidInput
from promoe.hint import Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.model_spec import ModelSpec
from promoe.request_id import about_answers

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

MOST_ANNOUNCED: Final = 8
"""Versions that a node may still sample for: it reads a welcome a step late, and changes may follow each other."""


@dataclass
class VersionCost:
    """What one version was asked, and the time it took."""

    observations: int = 0
    predict_s: float = 0.0

    def add(self, other: "VersionCost") -> None:
        """Adds up."""
        self.observations += other.observations
        self.predict_s += other.predict_s


@dataclass
class SessionCounters:
    """Of one session, written by its thread only.

    Attributes:
        observations: that came to the predictor.
        refused_observations: not of the running step, or with hidden states that are no numbers.
        hints: that were made.
        unsent_hints: those of them that the node left no room for: it does not read.
        predict_s: time spent in plug-ins.
        costs: of the newest versions that predicted.
    """

    observations: int = 0
    refused_observations: int = 0
    hints: int = 0
    unsent_hints: int = 0
    predict_s: float = 0.0
    costs: dict[str, VersionCost] = field(default_factory=dict)


@dataclass(frozen=True)
class _Role:
    """A version, and its part of what this session remembers."""

    predictor: Predictor
    predictions: PredictorSession
    cost: VersionCost


class Session:
    """What one node tells, in order, from one thread.

    Args:
        node: the node's name for itself, for the log.
        spec: the model both ends have.
        lineup: who makes the hints of steps that begin now; one lineup after the other.
        max_rows: rows an observation may have.

    Attributes:
        max_rows: see above.

    Raises:
        InternalError: the plug-in failed.
    """

    def __init__(self, node: str, spec: ModelSpec, lineup: Callable[[], Lineup], max_rows: int) -> None:
        self.node = node
        self.counters = SessionCounters()
        self._spec = spec
        self.max_rows = max_rows
        self._wanted = lineup
        self._newest = self._lineup = lineup()
        # What the node was told of lately, by the active version: it samples a step as the welcome says that it has
        # read.
        self._announced = {self._version.version: self._newest}
        self._step = self._num_tokens = 0
        self._answer_ids: tuple[str, ...] = ()
        self._active = self._opened(self._lineup.active)
        self._canary = None if self._lineup.canary is None else self._opened(self._lineup.canary.predictor)
        # Who predicts the running step, each for its part of it.
        self._parts: list[tuple[_Role, StepShare]] = []

    @property
    def announced(self) -> PredictorVersion:
        """What the node was told of last, with the wishes of all who look on."""
        return self._newest.announced

    @property
    def announced_canary(self) -> PredictorVersion | None:
        """The same of a version that has a share of the requests; None where there is none."""
        canary = self._newest.canary
        return None if canary is None else canary.predictor.version

    def begin_step(self, start: StepStart) -> PredictorVersion | None:
        """A forward pass begins, predicted by the versions that the node samples it for.

        Returns:
            What the node is to be told of, since who predicts changed; None where that is as it was.

        Raises:
            InvalidInput: steps do not count up, or it is sampled for a version that was not announced.
            InternalError: the plug-in failed.
        """
        if start.step <= self._step:
            raise InvalidInput(f"Step {start.step} came after step {self._step}; steps count up.")
        lineup = self._announced.get(start.version) if start.version else self._newest
        if lineup is None:
            raise InvalidInput(
                f"Step {start.step} is sampled for {start.version}; announced were {', '.join(self._announced)}."
            )
        self._step, self._num_tokens = start.step, start.num_tokens
        self._answer_ids = tuple(span.request_id for span in start.spans)
        if lineup is not self._lineup:
            self._go_on_with(lineup)
        self._begin_parts(start)
        wanted = self._wanted()
        return None if wanted is self._newest else self._announce(wanted)

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
        hints: list[Hint] = []
        for role, share in self._parts:
            hints += self._observe_part(role, share.of(observation))
        self.counters.observations += 1
        self.counters.hints += len(hints)
        return hints

    def end_requests(self, request_ids: Sequence[str]) -> None:
        """These requests are over; raises InternalError when the plug-in failed."""
        for role in (self._active, self._canary):
            if role is not None:
                self._guarded(role.predictor, partial(role.predictions.end_requests, request_ids))

    @property
    def _version(self) -> PredictorVersion:
        return self._lineup.active.version

    def _begin_parts(self, start: StepStart) -> None:
        self._parts.clear()
        lineup, canary = self._lineup, self._canary
        if lineup.canary is None or canary is None:
            self._begin_part(self._active, StepShare(start))
            return
        takes = lineup.canary.takes
        self._begin_part(self._active, StepShare(start, lambda request_id: not takes(request_id)))
        self._begin_part(canary, StepShare(start, takes))

    def _begin_part(self, role: "_Role", share: StepShare) -> None:
        if share.start.spans or self._canary is None:
            self._guarded(role.predictor, lambda: role.predictions.begin_step(share.start))
            self._parts.append((role, share))

    def _observe_part(self, role: "_Role", observation: Observation | None) -> Sequence[Hint]:
        if observation is None:
            return ()
        if observation.hidden_RD is None and role.predictor.version.observed is not ObservedKind.NONE:
            # A canary that the node has not read of yet.
            return ()
        begin_s = time.perf_counter()
        hints = self._guarded(role.predictor, lambda: role.predictions.observe(observation))
        taken_s = time.perf_counter() - begin_s
        self.counters.predict_s += taken_s
        role.cost.predict_s += taken_s
        role.cost.observations += 1
        # Many versions may have come and gone beside this one.
        self.counters.costs.setdefault(role.predictor.version.version, role.cost)
        return hints

    def _opened(self, predictor: Predictor) -> "_Role":
        costs, version = self.counters.costs, predictor.version.version
        while version not in costs and len(costs) >= MOST_ANNOUNCED:
            del costs[next(iter(costs))]
        cost = costs.setdefault(version, VersionCost())
        return _Role(predictor, self._guarded(predictor, predictor.open_session), cost)

    def _go_on_with(self, lineup: Lineup) -> None:
        """Between two steps; what the former versions remember of the requests goes on where kinds allow."""
        former, former_canary = self._active, self._canary
        if lineup.active is not former.predictor:
            if former_canary is not None and lineup.active is former_canary.predictor:
                self._active = former_canary
            else:
                self._active = self._opened(lineup.active)
            self._adopt(self._active, former)
        if former_canary is not None and lineup.canary is None:
            # Its requests are the active version's from now on.
            self._adopt(self._active, former_canary)
        if lineup.canary is None:
            self._canary = None
        elif former_canary is None or lineup.canary.predictor is not former_canary.predictor:
            self._canary = self._opened(lineup.canary.predictor)
            self._adopt(self._canary, former)
        self._lineup = lineup

    def _adopt(self, heir: "_Role", former: "_Role") -> None:
        adopting = heir.predictions
        if heir is not former and isinstance(adopting, AdoptingSession):
            self._guarded(heir.predictor, lambda: adopting.adopt(former.predictions))

    def _announce(self, lineup: Lineup) -> PredictorVersion:
        self._newest = lineup
        name = lineup.active.version.version
        self._announced.pop(name, None)
        self._announced[name] = lineup
        for version in list(self._announced)[:-MOST_ANNOUNCED]:
            if version != self._version.version:
                del self._announced[version]
        return lineup.announced

    def _check(self, observation: Observation) -> None:
        spec, num_rows = self._spec, len(observation.rows)
        if observation.layer > spec.num_moe_layers:
            raise InvalidInput(
                f"An observation is of MoE layer {observation.layer}; {spec.name} has {spec.num_moe_layers}."
            )
        ascend = all(row < later for row, later in pairwise((*observation.rows, observation.num_tokens)))
        if num_rows > self.max_rows or not ascend:
            raise InvalidInput(
                f"An observation has {num_rows} rows {observation.rows[: self.max_rows]} of {observation.num_tokens} "
                f"tokens; allowed: {self.max_rows} rows, each a token of the step, in their order."
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

        if observation.step == self._step and num_rows and observation.rows[-1] >= self._num_tokens:
            raise InvalidInput(
                f"An observation has row {observation.rows[-1]}; step {self._step} began with {self._num_tokens} "
                "tokens."
            )

    def _guarded(self, predictor: Predictor, call: Callable[[], _Result]) -> _Result:
        version = predictor.version.version
        try:
            return call()
        except Exception as error:
            # The edge to plug-ins, which may be anybody's: the process and the other sessions go on.
            logger.error(
                "The predictor %s failed; the session of node %s ends.",
                version,
                self.node,
                exc_info=error,
                extra=about_answers(self._answer_ids, node=self.node, step=self._step),
            )
            raise InternalError(
                f"The predictor {version} failed ({type(error).__name__}); the predictor service's log has the details."
            ) from error
