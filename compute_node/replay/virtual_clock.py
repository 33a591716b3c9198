"""Virtual time: seconds that pass when somebody waits or computes."""

import heapq
from collections.abc import Callable

from compute_node.clocked_transfers import ClockedTicket


class VirtualClock:
    """Seconds that pass when somebody waits or computes; what was planned for a moment happens when it comes."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._plans: list[tuple[float, int, Callable[[], None]]] = []
        self._num_planned = 0
        self._followers: list[Callable[[], None]] = []

    def __call__(self) -> float:
        """Now."""
        return self._now_s

    def follow(self, follower: Callable[[], None]) -> None:
        """Calls `follower` whenever time has passed."""
        self._followers.append(follower)

    def plan(self, at_s: float, action: Callable[[], None]) -> None:
        """Calls `action` when the clock reaches `at_s`; at its next advance where that is past."""
        self._num_planned += 1
        heapq.heappush(self._plans, (at_s, self._num_planned, action))

    def advance(self, seconds: float) -> None:
        """So much later."""
        self.advance_to(self._now_s + seconds)

    def advance_to(self, at_s: float) -> None:
        """Not earlier than `at_s`."""
        if at_s <= self._now_s and not self._plans:
            return
        while self._plans and self._plans[0][0] <= at_s:
            planned_s, _, action = heapq.heappop(self._plans)
            self._pass_to(planned_s)
            action()
        self._pass_to(at_s)

    def _pass_to(self, at_s: float) -> None:
        if at_s > self._now_s:
            self._now_s = at_s
            for follower in self._followers:
                follower()


class VirtualMarks:
    """Compute in virtual time is over when the next thing is asked for."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def mark_compute(self) -> ClockedTicket:
        """Done already."""
        return ClockedTicket(self._clock, self._clock())

    def synchronize(self) -> None:
        """Nothing is pending."""
