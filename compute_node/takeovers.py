"""Which predictor a node listens to, and how another one takes over while it serves.

One thread decides; others ask it, and the engine thread is never asked for anything:

    asked ──► connected ──► warmed up ──► switched ──► on trial ──► trusted
                 │              │                         │
              refused        refused                it failed: back to the one before, or looking for both

Knows no wire; a predictor is best effort, and so is everything here.
"""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from compute_node.hint_link import Connection, HintLink, Roles
from compute_node.predictor_trial import MOST_FAULTS, TakeoverTimes, Trial
from promoe.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.node_report import PredictorSwitch

logger = logging.getLogger(__name__)

MOST_WAITING: Final = 8
"""Who asks while another takes over waits; so many may."""

WARM_UP_STEPS: Final = 3
"""Whole steps that a candidate is shown at least, where there are steps."""

_POLL_S: Final = 0.05
_WATCH_S: Final = 0.5

ITSELF: Final = "the node itself"
"""Who goes back when one on trial has failed."""


@dataclass(frozen=True)
class _Wish:
    endpoint: str
    who: str
    why: str
    outcome: "Future[PredictorSwitch | None]"


@dataclass
class TakeoverCounts:
    """Since the start.

    Attributes:
        switched: another predictor was wished for and has taken over.
        refused: it could not.
        returned: one on trial failed, and the node went back by itself.
    """

    switched: int = 0
    refused: int = 0
    returned: int = 0


class Takeovers:
    """Owns the roles of one link.

    Args:
        link: between the predictors and the engine thread.
        endpoint: of the predictor that the node is started with; empty for none.
        times: how long what may take.

    Attributes:
        link: see above.
        last_switch: the last change of the endpoint; None before the first.
        counts: see TakeoverCounts.
    """

    def __init__(self, link: HintLink, endpoint: str, times: TakeoverTimes | None = None) -> None:
        self.link = link
        self.last_switch: PredictorSwitch | None = None
        self.counts = TakeoverCounts()
        self._first_endpoint = endpoint
        self._times = times or TakeoverTimes()
        self._trial: Trial | None = None
        # Both ends of a deque are safe without a lock; there is something to look at when the event is set.
        self._waiting: deque[_Wish] = deque()
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="takeovers", daemon=True)

    # ---- any thread

    @property
    def endpoint(self) -> str:
        """Of the predictor whose hints are taken; empty for none."""
        incumbent = self.link.roles.incumbent
        return "" if incumbent is None else incumbent.endpoint

    @property
    def candidate(self) -> str:
        """Of the one that is tried out; empty for none."""
        candidate = self.link.roles.candidate
        return "" if candidate is None else candidate.endpoint

    @property
    def previous(self) -> str:
        """Of the one that is gone back to if the present one fails; empty for none."""
        trial = self._trial
        return "" if trial is None else trial.previous

    def start(self) -> None:
        """Looks for the first predictor; does not wait for it."""
        if self._first_endpoint:
            self.link.roles = Roles(self.link.open(self._first_endpoint, self._news.set))
        self._thread.start()

    def connect(self, endpoint: str, who: str, why: str) -> "Future[PredictorSwitch | None]":
        """Asks for another predictor; one is served after the other.

        Returns:
            The switch, once it has happened; None where the endpoint is in use already. Fails with ModelNotFound
            (nobody answers there), ModelMismatch (another model or schema), InternalError (it fails while it is tried
            out), Overloaded, or Unavailable (the node ends); nothing has changed then.

        Raises:
            InvalidInput: nobody is named.
            Overloaded: too many are waiting.
        """
        if not who.strip():
            raise InvalidInput("Nobody is named: who wants another predictor is written into the log.")
        if len(self._waiting) >= MOST_WAITING:
            raise Overloaded(f"{MOST_WAITING} others wait for another predictor already.")
        wish = _Wish(endpoint, who.strip(), why.strip(), Future())
        self._waiting.append(wish)
        self._news.set()
        if self._closing.is_set():
            self._refuse_all()
        return wish.outcome

    def close(self) -> None:
        """Ends every session."""
        self._closing.set()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()
        self._refuse_all()
        self.link.close_all()

    def _refuse_all(self) -> None:
        with suppress(IndexError):  # none is left
            while True:
                wish = self._waiting.popleft()
                if wish.outcome.set_running_or_notify_cancel():
                    wish.outcome.set_exception(Unavailable("The node is ending."))

    # ---- this thread

    def _run(self) -> None:
        while not self._closing.is_set():
            if not self._waiting:
                self._pause(_WATCH_S if self._trial is not None else None)
            if self._waiting:
                self._answer(self._waiting.popleft())
            elif self._trial is not None:
                self._watch(self._trial)

    def _pause(self, timeout_s: float | None) -> None:
        """Until somebody asks for something, a client has something to tell, or the time is over."""
        self._news.wait(timeout_s)
        self._news.clear()

    def _answer(self, wish: _Wish) -> None:
        if not wish.outcome.set_running_or_notify_cancel():
            return
        incumbent = self.link.roles.incumbent
        if incumbent is not None and incumbent.endpoint == wish.endpoint:
            wish.outcome.set_result(None)
            return
        candidate = self._try_out(wish.endpoint)
        try:
            self._await_welcome(candidate)
            self._warm_up(candidate)
        except PromoeError as error:
            self._let_go(candidate)
            self.counts.refused += 1
            refusal = _refusal(error, wish.endpoint, self.endpoint)
            logger.warning("%s (Asked for by %s: %s)", refusal, wish.who, wish.why or "no reason given")
            wish.outcome.set_exception(refusal)
            return
        switch = self._switch(candidate, wish.who, wish.why, is_return=False)
        if incumbent is not None and self._times.trial_s > 0:
            self._trial = Trial(candidate, incumbent.endpoint, self._times)
        wish.outcome.set_result(switch)
        self._drain(incumbent)

    def _try_out(self, endpoint: str) -> Connection:
        candidate = self.link.open(endpoint, self._news.set, is_quiet=True)
        self.link.roles = Roles(self.link.roles.incumbent, candidate)
        return candidate

    def _let_go(self, candidate: Connection) -> None:
        self.link.roles = Roles(self.link.roles.incumbent)
        self.link.close(candidate)

    def _await_welcome(self, candidate: Connection) -> None:
        """Raises the PromoeError that keeps it from saying what it wants to see."""
        until_s = time.perf_counter() + self._times.handshake_s
        while candidate.client.active is None:
            self._check(candidate)
            if time.perf_counter() >= until_s:
                raise DeadlineExceeded(f"No handshake came about within {self._times.handshake_s:g} s.")
            self._pause(_POLL_S)

    def _warm_up(self, candidate: Connection) -> None:
        """Shown steps beside the incumbent, it must answer with hints; raises PromoeError when it does not."""
        times = self._times
        began_s = shown_s = time.perf_counter()
        num_shown = 0
        while True:
            self._check(candidate)
            now_s = time.perf_counter()
            if candidate.num_shown > num_shown:
                num_shown, shown_s = candidate.num_shown, now_s
            active = candidate.client.active
            has_answered = candidate.tap.num_withheld > 0 or (active is not None and not active.lookaheads)
            is_warm = num_shown >= WARM_UP_STEPS
            if (is_warm and has_answered) or (not is_warm and now_s - shown_s >= times.idle_s):
                return
            if now_s - began_s >= times.warm_up_s:
                raise DeadlineExceeded(f"It was shown {num_shown} steps in {times.warm_up_s:g} s and gave no hint.")
            self._pause(_POLL_S)

    def _check(self, candidate: Connection) -> None:
        if self._closing.is_set():
            raise Unavailable("The node is ending.")
        if candidate.client.trouble is not None:
            raise candidate.client.trouble
        if candidate.num_faults > MOST_FAULTS:
            raise InvalidInput(f"{candidate.num_faults} of its hints made no sense.")

    def _switch(self, candidate: Connection, who: str, why: str, is_return: bool) -> PredictorSwitch:
        """From the next step on."""
        now_unix_s = time.time()
        before = self.link.roles.incumbent
        switch = PredictorSwitch(now_unix_s, self.endpoint, candidate.endpoint, who, why, is_return)
        self._trial = None
        self.last_switch = switch
        if is_return:
            self.counts.returned += 1
        else:
            self.counts.switched += 1
        self.link.roles = Roles(candidate)
        candidate.client.log.is_quiet = False
        if before is not None:
            before.client.log.is_quiet = True
        active = candidate.client.active
        logger.log(
            logging.WARNING if is_return else logging.INFO,
            "The predictor at %s (%s) has taken over%s, by the wish of %s: %s",
            candidate.endpoint,
            "away just now" if active is None else active.version,
            f" from the one at {switch.before}" if switch.before else "",
            who,
            why or "no reason given",
        )
        return switch

    def _drain(self, leaving: Connection | None) -> None:
        """Heard out, where the engine runs, and closed."""
        if leaving is None:
            return
        until_s = time.perf_counter() + self._times.drain_s
        while not self.link.has_left(leaving) and not self._closing.is_set() and time.perf_counter() < until_s:
            self._pause(_POLL_S)
        self.link.close(leaving)

    def _watch(self, trial: Trial) -> None:
        failure = trial.failure()
        if failure is not None:
            self._go_back(trial, failure)
        elif trial.is_passed():
            self._trial = None
            logger.info("The predictor at %s has passed its trial.", trial.connection.endpoint)

    def _go_back(self, trial: Trial, failure: str) -> None:
        """To the one before, if it is there; else both are looked for, this one by its own client."""
        failed = trial.connection
        former = self._try_out(trial.previous)
        try:
            self._await_welcome(former)
        except PromoeError as error:
            self._let_go(former)
            # Said once: while both are away this is tried again and again.
            if not trial.is_renewed and not self._closing.is_set():
                logger.warning(
                    "The predictor at %s failed on trial (%s), and the one before it, at %s, cannot take over: %s",
                    failed.endpoint,
                    failure,
                    trial.previous,
                    error,
                )
            trial.renew()
            return
        self._switch(former, ITSELF, f"The predictor at {failed.endpoint} failed on trial: {failure}.", is_return=True)
        self._drain(failed)


def _refusal(error: PromoeError, endpoint: str, incumbent: str) -> PromoeError:
    """For who asked. UNAVAILABLE and DEADLINE_EXCEEDED would say that the node is not there or did not answer."""
    kept = f"the node stays with the one at {incumbent}" if incumbent else "the node goes on without one"
    reason = str(error).rstrip(".")
    text = f"The predictor at {endpoint} cannot take over, and {kept}: {reason}."
    if isinstance(error, ModelMismatch):
        return ModelMismatch(text)
    if isinstance(error, Unavailable | DeadlineExceeded):
        return ModelNotFound(text)
    return InternalError(text)
