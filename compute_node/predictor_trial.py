"""How long a predictor that takes over is waited for, and what it must not do for a while after it has."""

import time
from dataclasses import dataclass
from typing import Final

from compute_node.hint_link import Connection

MOST_FAULTS: Final = 8
"""Hints that make no sense: more of them, from one that is tried out or on trial, and it has failed."""


@dataclass(frozen=True)
class TakeoverTimes:
    """How long what may take.

    Attributes:
        handshake_s: until a candidate has said what it wants to see.
        idle_s: without a step for so long a node has nothing to show; the handshake suffices then.
        warm_up_s: until a candidate that is shown steps has answered with hints.
        drain_s: until the engine thread, where it runs, has heard out the one that leaves.
        trial_s: a predictor that fails within this time after it took over is left for the one before; 0: none is.
    """

    handshake_s: float = 15.0
    idle_s: float = 1.0
    warm_up_s: float = 10.0
    drain_s: float = 1.0
    trial_s: float = 60.0


@dataclass(frozen=True)
class Trial:
    """Of the one that has taken over.

    Attributes:
        previous: endpoint of the one before.
        began_s: when, or when it failed last without there having been anybody to go back to.
        num_failures, num_faults: of its client by then.
    """

    previous: str
    began_s: float
    num_failures: int
    num_faults: int

    @classmethod
    def of(cls, connection: Connection, previous: str) -> "Trial":
        """From now on."""
        return cls(previous, time.perf_counter(), connection.client.num_failures, connection.num_faults)

    def failure(self, connection: Connection) -> str | None:
        """What it did wrong since."""
        client = connection.client
        if client.num_failures > self.num_failures:
            return str(client.trouble).rstrip(".")
        num_faults = connection.num_faults - self.num_faults
        return f"{num_faults} of its hints made no sense" if num_faults > MOST_FAULTS else None

    def is_passed(self, connection: Connection, trial_s: float) -> bool:
        """It is there, its time is over, and it has given hints, if it gives any: an idle node may wait long."""
        active = connection.client.active
        has_proved = active is not None and (connection.tap.num_taken > 0 or not active.lookaheads)
        return has_proved and time.perf_counter() - self.began_s >= trial_s
