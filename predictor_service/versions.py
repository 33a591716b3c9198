"""Which versions make the hints now, and which did before: changed while nodes are served, between two of their steps.

                                                             ┌─► active ──► previous (kept, for a rollback)
    asked for ──► loaded ──► tried out ──► written down ──► ─┼─► canary: makes the hints of some requests
                                                             └─► shadow: looks on, is scored

Sessions look at `lineup` whenever a step begins (see `Session.begin_step`). What is written down as active is what a
service that is started again goes on with; a canary and a shadow end with it.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from predictor_service.lineup import Canary, Lineup, observed_by
from predictor_service.predictor import Predictor
from predictor_service.version_log import VersionLog, Wish
from promoe.errors import InternalError, InvalidInput, ModelMismatch, PromoeError
from promoe.hint import LayerRouting, Observation, ObservedKind, PredictorVersion, StepSpan, StepStart
from promoe.model_spec import ModelSpec
from promoe.predictor_versions import VersionAction, VersionChange, VersionMetric

logger = logging.getLogger(__name__)

_TRIAL: Final = "trial"


class Versions:
    """The active version, the one before it, and those that are tried; usable from several threads.

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
        self._lineup = Lineup(first)
        self._previous: Predictor | None = None
        self._shadow: Predictor | None = None

    @property
    def lineup(self) -> Lineup:
        """Who makes the hints of steps that begin now, and who looks on."""
        return self._lineup

    @property
    def active(self) -> Predictor:
        """What makes the hints, but for those of a canary."""
        return self._lineup.active

    @property
    def canary(self) -> Canary | None:
        """What makes the hints of some requests."""
        return self._lineup.canary

    @property
    def shadow(self) -> Predictor | None:
        """What looks on and is scored."""
        return self._shadow

    @property
    def previous(self) -> Predictor | None:
        """What did before; None before the first change."""
        return self._previous

    def started(self) -> None:
        """Takes down that the service begins; where it cannot be, it begins all the same."""
        try:
            wish = Wish("the service", "it was started")
            self.log.add(VersionAction.START, "", self.active.version.version, wish)
        except PromoeError as error:
            logger.warning("%s", error)

    def activate(self, version: str, wish: Wish) -> VersionChange | None:
        """Makes a version the active one; None when it is already. A canary is over then.

        Raises:
            ModelNotFound, InvalidInput, ModelMismatch: there is none, it is damaged, or for another model.
            ModelMismatch: another version is active than the one who asks believes.
            InternalError: it fails when it is tried out.
            ResourceExhausted: it cannot be written down. Nothing has changed in any of these cases.
        """
        with self._changing:
            self._check_expected(wish)
            if _is_called(self.active, version) and self.canary is None:
                return None
            return self._change_to(self._found(version), VersionAction.ACTIVATE, wish)

    def activate_canary(self, version: str, share: float, wish: Wish) -> VersionChange | None:
        """Lets a version make the hints of a share of the requests; None when it does already.

        Raises:
            InvalidInput: a share that is none, the active version, or one that reads other hidden states.
            PromoeError: as `activate`.
        """
        with self._changing:
            self._check_expected(wish)
            canary = self.canary
            if canary is not None and _is_called(canary.predictor, version) and canary.share == share:
                return None
            candidate = Canary(self._other(version), share)
            # What cannot be shown is refused before anything is written down.
            lineup = replace(self._lineup, canary=candidate)
            observed_by([lineup.announced, candidate.predictor.version])
            numbers = (VersionMetric("share", share),)
            change = self._add(VersionAction.CANARY, candidate.predictor, replace(wish, numbers=wish.numbers + numbers))
            self._lineup = lineup
            return change

    def rollback(self, wish: Wish) -> VersionChange:
        """Ends a canary; where there is none, makes the version before the active one that again, at once: it was kept.

        Raises:
            InvalidInput: there is none.
            ModelMismatch, ResourceExhausted: as `activate`.
        """
        with self._changing:
            self._check_expected(wish)
            if self.canary is not None:
                change = self._add(VersionAction.END_CANARY, self.canary.predictor, wish)
                self._lineup = replace(self._lineup, canary=None)
                return change
            if self._previous is None:
                raise InvalidInput(
                    f"Nothing was active before {self.active.version.version} since the service was started; "
                    "activate the version that is wanted."
                )
            return self._change_to(self._previous, VersionAction.ROLLBACK, wish)

    def set_shadow(self, version: str, wish: Wish, begin: Callable[[Predictor], None]) -> VersionChange | None:
        """Lets a version look on, in place of another that did; None when it does already.

        Args:
            version: which.
            wish: who asks.
            begin: makes it run; what it raises leaves everything as it was.

        Raises:
            InvalidInput: it is active, or reads other hidden states than the active version.
            PromoeError: as `activate`.
        """
        with self._changing:
            self._check_expected(wish)
            if self._shadow is not None and _is_called(self._shadow, version):
                return None
            candidate = self._other(version)
            lineup = replace(self._lineup, onlookers=(candidate.version,))
            observed_by([lineup.announced])
            begin(candidate)
            change = self._add(VersionAction.SHADOW, candidate, wish)
            self._shadow, self._lineup = candidate, lineup
            return change

    def clear_shadow(self, wish: Wish) -> VersionChange | None:
        """Ends looking on; None when nobody does; raises ResourceExhausted when it cannot be written down."""
        with self._changing:
            if self._shadow is None:
                return None
            change = self._add(VersionAction.CLEAR_SHADOW, self._shadow, wish)
            self._shadow, self._lineup = None, replace(self._lineup, onlookers=())
            return change

    def show_more(self, is_scored: bool) -> None:
        """Whether the nodes show what hints are scored by."""
        with self._changing:
            if self._lineup.is_scored != is_scored:
                self._lineup = replace(self._lineup, is_scored=is_scored)

    def gather(self, wishes: PredictorVersion | None) -> None:
        """What is to be shown for learning; None: nothing."""
        with self._changing:
            if self._lineup.gatherer != wishes:
                self._lineup = replace(self._lineup, gatherer=wishes)

    def _check_expected(self, wish: Wish) -> None:
        active = self.active.version.version
        if wish.expected is not None and wish.expected != active:
            raise ModelMismatch(
                f"{wish.who} expected {wish.expected} to be active, and it is {active}: somebody changed it meanwhile."
            )

    def _change_to(self, candidate: Predictor, action: VersionAction, wish: Wish) -> VersionChange:
        """Written down first: a service that is killed in between goes on with what was asked for."""
        former = self.active
        before, after = former.version.version, candidate.version.version
        # A shadow that cannot look on any more, or is active now, is none.
        onlookers = tuple(wishes for wishes in self._lineup.onlookers if wishes.version != after)
        lineup = replace(self._lineup, active=candidate, canary=None, onlookers=onlookers)
        try:
            observed_by([lineup.announced])
        except InvalidInput:
            lineup = replace(lineup, onlookers=())
        change = self.log.add(action, before, after, wish)
        self._lineup = lineup
        if not lineup.onlookers:
            self._shadow = None
        if candidate is not former:
            self._previous = former
        logger.info("%s is active now, and was %s: %s by %s (%s).", after, before, action.value, wish.who, wish.why)
        return change

    def _add(self, action: VersionAction, candidate: Predictor, wish: Wish) -> VersionChange:
        active, version = self.active.version.version, candidate.version.version
        change = self.log.add(action, active, active, wish, version)
        logger.info("%s: %s by %s (%s).", version, action.value, wish.who, wish.why)
        return change

    def _other(self, version: str) -> Predictor:
        """One that is not active, which could not be told from itself."""
        if _is_called(self.active, version):
            raise InvalidInput(f"{version} is active: it makes the hints already.")
        return self._found(version)

    def _found(self, version: str) -> Predictor:
        """What is loaded already, or else loaded and tried out."""
        canary = None if self.canary is None else self.canary.predictor
        for loaded in (self.active, self._previous, self._shadow, canary):
            if loaded is not None and version == loaded.version.version:
                return loaded
        return self._loaded(version)

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


def _is_called(predictor: Predictor, version: str) -> bool:
    return version in (predictor.version.version, predictor.version.predictor)
