"""Loads in virtual time: the same queue as the transfer thread's, over a link that is a rate.

Nothing runs by itself: whenever the clock has advanced, the link's choices are worked out up to its present, so that
a load submitted now cannot change what the link chose before.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compute_node.chunks_in_flight import LinkMeter
from compute_node.load_queue import ChunkSettings, LoadQueue
from compute_node.loads import Load, LoadState


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


@dataclass(frozen=True)
class LinkModel:
    """What a link costs.

    Attributes:
        bytes_per_s: while it is busy.
        chunk_s: of every chunk, beside its bytes.
        wake_s: from a copy's end until the host that waited for it goes on.
    """

    bytes_per_s: float
    chunk_s: float = 0.0
    wake_s: float = 0.0

    def __post_init__(self) -> None:
        assert self.bytes_per_s > 0, "a link moves bytes"

    def copy_s(self, nbytes: int) -> float:
        """How long one chunk occupies the link."""
        return self.chunk_s + nbytes / self.bytes_per_s


@dataclass(frozen=True)
class VirtualTicket:
    """A chunk that arrives at `end_s`; whoever waits for it lets the time pass, and wakes `wake_s` later."""

    clock: VirtualClock
    end_s: float
    wake_s: float = 0.0

    def is_done(self) -> bool:
        """True once its time has come."""
        return self.clock() >= self.end_s

    def wait_on_host(self) -> None:
        """Until its time has come."""
        if not self.is_done():
            self.clock.advance_to(self.end_s + self.wake_s)

    def wait_on_compute(self) -> None:
        """Compute and host share one clock."""
        self.wait_on_host()


class VirtualMarks:
    """Compute in virtual time is over when the next thing is asked for."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def mark_compute(self) -> VirtualTicket:
        """Done already."""
        return VirtualTicket(self._clock, self._clock())

    def synchronize(self) -> None:
        """Nothing is pending."""


class VirtualTransfers:
    """`Transfers` in virtual time. A load is ISSUED when its last chunk is handed to the link, as on a GPU.

    Args:
        clock: shared with whoever computes.
        link: what copies cost.
        chunks: how loads are cut, and how many chunks are handed over ahead.
    """

    def __init__(self, clock: VirtualClock, link: LinkModel, chunks: ChunkSettings) -> None:
        self.queue = LoadQueue(chunks)
        self.meter = LinkMeter()
        self._clock = clock
        self._link = link
        self._max_in_flight = chunks.max_in_flight
        # When each chunk that was handed over arrives, and until when the link's choices are worked out.
        self._arrivals_s: deque[float] = deque()
        self._decided_s = 0.0
        clock.follow(self._catch_up)

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        self.queue.submit(loads)
        self._catch_up()

    def promote(self, load: Load) -> None:
        """See `Transfers`."""
        self.queue.promote(load)

    def pause(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        self.queue.pause(loads)

    def settle(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        for load in loads:
            load.ticket.wait_on_host()

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """See `Transfers`; lets the time pass until a chunk's turn makes one of them ISSUED."""
        while True:
            issued = [load for load in loads if load.state is LoadState.ISSUED]
            if issued:
                return min(issued, key=lambda load: load.end_s)
            assert any(load in self.queue for load in loads), "somebody moves one of them"
            self._clock.advance_to(self._next_choice_s())

    def queued_nbytes(self) -> int:
        """See `Transfers`."""
        return self.queue.queued_nbytes

    def link_bytes_per_s(self) -> float | None:
        """See `Transfers`; as the transfer thread would have measured it."""
        return self.meter.bytes_per_s

    def _next_choice_s(self) -> float:
        """When the link will have room for one more chunk."""
        arrivals_s, decided_s = self._arrivals_s, self._decided_s
        if len(arrivals_s) < self._max_in_flight or arrivals_s[0] <= decided_s:
            return decided_s
        return arrivals_s[0]

    def _catch_up(self) -> None:
        """Chooses every chunk whose turn came up to now."""
        now_s = self._clock()
        if not self.queue:
            self._decided_s = now_s
            return
        arrivals_s = self._arrivals_s
        while (choice_s := self._next_choice_s()) <= now_s:
            while arrivals_s and arrivals_s[0] <= choice_s:
                arrivals_s.popleft()
            chunk = self.queue.next_chunk()
            if chunk is None:
                break
            self._decided_s = choice_s
            begin_s = max(choice_s, arrivals_s[-1]) if arrivals_s else choice_s
            end_s = begin_s + self._link.copy_s(chunk.nbytes)
            arrivals_s.append(end_s)
            if chunk.offset == 0:
                # As on a GPU: when it was handed over, though bytes before it may still be under way.
                chunk.load.begin_s = choice_s
            chunk.load.end_s = end_s
            self.meter.add(chunk.nbytes, end_s - begin_s)
            self.queue.issued(VirtualTicket(self._clock, end_s, self._link.wake_s))
        self._decided_s = max(self._decided_s, now_s)
