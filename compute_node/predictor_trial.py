"""How long a predictor that takes over is waited for, and what it must not do for a while after it has."""

import time
from dataclasses import dataclass
from typing import Final

from compute_node.hint_link import Connection

MOST_FAULTS: Final = 8
"""Hints that make no sense: more of them, from one that is tried out or on trial, and it has failed."""


ENOUGH_SHOWN: Final = 64
"""Observations of which none was answered before silence means something."""


@dataclass(frozen=True)
class TakeoverTimes:
    """How long what may take.

    Attributes:
        handshake_s: until a candidate has said what it wants to see.
        idle_s: without a step for so long a node has nothing to show; the handshake suffices then.
        warm_up_s: until a candidate that is shown steps has answered with hints.
        drain_s: until the engine thread, where it runs, has heard out the one that leaves.
        trial_s: a predictor that fails within this time after it took over is left for the one before; 0: none is.
        silence_s: without a hint for so long, while it is shown enough, one on trial has failed.
    """

    handshake_s: float = 15.0
    idle_s: float = 1.0
    warm_up_s: float = 10.0
    drain_s: float = 1.0
    trial_s: float = 60.0
    silence_s: float = 10.0


class Trial:
    """Of a predictor that has taken over; one thread asks how it does, now and then.

    Args:
        connection: to it; there was no failure before.
        previous: endpoint of the one before.
        times: how long what may take.

    Attributes:
        connection, previous: see above.
        is_renewed: it failed, there was nobody to go back to, and it has not come back since.
    """

    def __init__(self, connection: Connection, previous: str, times: TakeoverTimes) -> None:
        self.connection = connection
        self.previous = previous
        self.is_renewed = False
        self._times = times
        self._began_s = self._heard_s = time.perf_counter()
        self._num_failures = self._num_faults = 0
        self._num_taken = self._num_shown = 0

    def renew(self) -> None:
        """It failed, and there was nobody to go back to: it has its time once more."""
        self.is_renewed = True
        self._began_s = self._heard_s = time.perf_counter()
        self._num_failures, self._num_faults = self.connection.client.num_failures, self.connection.num_faults

    def failure(self) -> str | None:
        """What it did wrong so far; None for nothing."""
        client = self.connection.client
        if client.num_failures > self._num_failures:
            return str(client.trouble).rstrip(".")
        num_faults = self.connection.num_faults - self._num_faults
        if num_faults > MOST_FAULTS:
            return f"{num_faults} of its hints made no sense"
        if self._gives_hints() and self._has_fallen_silent():
            return f"it was shown layers for {self._times.silence_s:g} s and gave no hint"
        if client.active is not None:
            self.is_renewed = False
        return None

    def is_passed(self) -> bool:
        """It is there, its time is over, and it has given hints, if it gives any: an idle node may wait long."""
        is_proved = self.connection.tap.num_taken > 0 or not self._gives_hints()
        is_there = self.connection.client.active is not None
        return is_there and is_proved and time.perf_counter() - self._began_s >= self._times.trial_s

    def _gives_hints(self) -> bool:
        active = self.connection.client.active
        return active is None or bool(active.lookaheads)

    def _has_fallen_silent(self) -> bool:
        """Nothing was heard while enough was shown; a node that shows little learns nothing from silence."""
        num_taken, traffic, now_s = self.connection.tap.num_taken, self.connection.client.traffic, time.perf_counter()
        num_shown = traffic.observations_sent + traffic.observations_dropped
        if num_taken > self._num_taken:
            self._num_taken, self._num_shown, self._heard_s = num_taken, num_shown, now_s
        elif num_shown - self._num_shown < ENOUGH_SHOWN:
            self._heard_s = now_s
        return now_s - self._heard_s >= self._times.silence_s
