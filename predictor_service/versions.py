"""Which version makes the hints now, and which did before: changed while nodes are served, between two of their steps.

    asked for ──► loaded ──► tried out ──► written down ──► active ──► previous (kept, for a rollback)

Sessions look at `active` whenever a step begins (see `Session.begin_step`). What is written down is what a service that
is started again goes on with.
"""

import logging
import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from predictor_service.predictor import Predictor
from predictor_service.version_log import VersionLog, Wish
from promoe.errors import InternalError, InvalidInput, ModelMismatch, PromoeError
from promoe.hint import LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from promoe.model_spec import ModelSpec
from promoe.predictor_versions import VersionAction, VersionChange

logger = logging.getLogger(__name__)

_TRIAL: Final = "trial"


class Versions:
    """The active version and the one before it; usable from several threads.

    Args:
        spec: the model whose experts are predicted.
        first: what the service begins with.
        load: makes a predictor of `name@version`; raises PromoeError.
        log: takes down every change.
    """

    def __init__(self, spec: ModelSpec, first: Predictor, load: Callable[[str], Predictor], log: VersionLog) -> None:
        self.log = log
        self._spec = spec
        self._load = load
        self._changing = threading.Lock()
        self._active = first
        self._previous: Predictor | None = None

    @property
    def active(self) -> Predictor:
        """What makes the hints of steps that begin now."""
        return self._active

    @property
    def previous(self) -> Predictor | None:
        """What did before; None before the first change."""
        return self._previous

    def started(self) -> None:
        """Takes down that the service begins; where it cannot be, it begins all the same."""
        try:
            wish = Wish("the service", "it was started")
            self.log.add(VersionAction.START, "", self._active.version.version, wish)
        except PromoeError as error:
            logger.warning("%s", error)

    def activate(self, version: str, wish: Wish) -> VersionChange | None:
        """Makes a version the active one; None when it is already.

        Raises:
            ModelNotFound, InvalidInput, ModelMismatch: there is none, it is damaged, or for another model.
            ModelMismatch: another version is active than the one who asks believes.
            InternalError: it fails when it is tried out.
            ResourceExhausted: it cannot be written down. Nothing has changed in any of these cases.
        """
        with self._changing:
            self._check_expected(wish)
            if version in (self._active.version.version, self._active.version.predictor):
                return None
            previous = self._previous
            if previous is not None and previous.version.version == version:
                return self._change_to(previous, VersionAction.ACTIVATE, wish)
            return self._change_to(self._loaded(version), VersionAction.ACTIVATE, wish)

    def rollback(self, wish: Wish) -> VersionChange:
        """Makes the version before the active one again, at once: it was kept.

        Raises:
            InvalidInput: there is none.
            ModelMismatch, ResourceExhausted: as `activate`.
        """
        with self._changing:
            self._check_expected(wish)
            if self._previous is None:
                raise InvalidInput(
                    f"Nothing was active before {self._active.version.version} since the service was started; "
                    "activate the version that is wanted."
                )
            return self._change_to(self._previous, VersionAction.ROLLBACK, wish)

    def _check_expected(self, wish: Wish) -> None:
        active = self._active.version.version
        if wish.expected is not None and wish.expected != active:
            raise ModelMismatch(
                f"{wish.who} expected {wish.expected} to be active, and it is {active}: somebody changed it meanwhile."
            )

    def _change_to(self, candidate: Predictor, action: VersionAction, wish: Wish) -> VersionChange:
        """Written down first: a service that is killed in between goes on with what was asked for."""
        former = self._active
        before, after = former.version.version, candidate.version.version
        change = self.log.add(action, before, after, wish)
        self._active, self._previous = candidate, former
        logger.info("%s is active now, and was %s: %s by %s (%s).", after, before, action.value, wish.who, wish.why)
        return change

    def _loaded(self, version: str) -> Predictor:
        candidate = self._load(version)
        found = candidate.version
        if version not in (found.version, found.predictor):
            raise ModelMismatch(f"{version} was asked for, and {found.version} is what was found.")
        self._try_out(candidate)
        return candidate

    def _try_out(self, candidate: Predictor) -> None:
        """One made-up step, so that what cannot predict at all never becomes active."""
        spec, wanted = self._spec, candidate.version
        ids_RK = np.arange(spec.experts_per_token, dtype=np.uint16)[None]
        hidden_RD = None
        if wanted.observed is not ObservedKind.NONE:
            hidden_RD = np.zeros((1, spec.hidden_size), np.float32)
        try:
            session = candidate.open_session()
            session.begin_step(StepStart(1, (StepSpan(_TRIAL, 1, is_prefill=False),)))
            for layer in range(spec.num_moe_layers):
                routings = (LayerRouting(layer, ids_RK),) if wanted.wants_routing else ()
                for hint in session.observe(Observation(1, layer, (0,), 1, hidden_RD, routings)):
                    if not np.isfinite(hint.scores).all():
                        raise InvalidInput(f"{wanted.version} gives scores that are no numbers when it is tried out.")
            session.end_requests((_TRIAL,))
        except PromoeError:
            raise
        except Exception as error:
            # The edge to plug-ins, which may be anybody's.
            logger.error("%s failed when it was tried out.", wanted.version, exc_info=error)
            raise InternalError(
                f"{wanted.version} failed when it was tried out ({type(error).__name__}); the predictor service's log "
                "has the details."
            ) from error
