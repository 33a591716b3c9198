"""Loads over a link that is a rate, without a thread: the same queue as the transfer thread's.

Nothing runs by itself: whenever somebody asks, the link's choices are worked out up to the clock's present, so that a
load submitted now cannot change what the link chose before. In a replay the clock is virtual; where a link is played on
a CPU it is the real one (`EmulatedTransfers`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from compute_node.chunks_in_flight import LinkMeter
from compute_node.load_queue import Chunk, ChunkSettings, LoadQueue
from compute_node.loads import Load, LoadState
from promoe.ids import ExpertId


class LinkClock(Protocol):
    """The time that a link keeps."""

    def __call__(self) -> float:
        """Now, in seconds."""

    def follow(self, follower: Callable[[], None]) -> None:
        """Calls `follower` whenever time was let pass."""

    def advance_to(self, at_s: float) -> None:
        """Lets the time pass until then."""


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


class ClockedTicket(NamedTuple):
    """A chunk that arrives at `end_s`; whoever waits for it lets the time pass, and wakes `wake_s` later."""

    clock: LinkClock
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


class ClockedTransfers:
    """`Transfers` without a thread. A load is ISSUED when its last chunk is handed to the link, as on a GPU.

    Args:
        clock: shared with whoever computes.
        link: what copies cost.
        chunks: how loads are cut, and how many chunks are handed over ahead.
        copy: moves bytes when their chunks' turn has come; None where there are none.
    """

    def __init__(
        self,
        clock: LinkClock,
        link: LinkModel,
        chunks: ChunkSettings,
        copy: Callable[[Chunk], None] | None = None,
    ) -> None:
        self.queue = LoadQueue(chunks)
        self.meter = LinkMeter()
        self._clock = clock
        self._link = link
        self._copy = copy
        self._max_in_flight = chunks.max_in_flight
        # When each chunk that was handed over arrives, and until when the link's choices are worked out.
        self._arrivals_s: deque[float] = deque()
        self._decided_s = 0.0
        clock.follow(self.catch_up)

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        self.queue.submit(loads)
        self.catch_up()

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

    def settle_expert(self, expert: ExpertId) -> None:
        """See `Transfers`: a chunk is copied at once when its turn has come."""

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """See `Transfers`; lets the time pass until a chunk's turn makes one of them ISSUED."""
        while True:
            issued = [load for load in loads if load.state is LoadState.ISSUED]
            if issued:
                return min(issued, key=lambda load: load.end_s)
            assert any(load in self.queue for load in loads), "somebody moves one of them"
            self._clock.advance_to(self.next_choice_s())

    def queued_nbytes(self) -> int:
        """See `Transfers`."""
        return self.queue.queued_nbytes

    def link_bytes_per_s(self) -> float | None:
        """See `Transfers`; as the transfer thread would have measured it."""
        return self.meter.bytes_per_s

    def next_choice_s(self) -> float:
        """When the link will have room for one more chunk."""
        arrivals_s, decided_s = self._arrivals_s, self._decided_s
        if len(arrivals_s) < self._max_in_flight or arrivals_s[0] <= decided_s:
            return decided_s
        return arrivals_s[0]

    def catch_up(self) -> None:
        """Chooses every chunk whose turn came up to now."""
        now_s = self._clock()
        while self.next_choice_s() <= now_s and (load := self.queue.next_load()) is not None:
            self._move(load, now_s)
        self._decided_s = max(self._decided_s, now_s)

    def _move(self, load: Load, now_s: float) -> None:
        """The chunks of this load whose turn came up to now: nothing came in between that could change the order."""
        arrivals_s, link = self._arrivals_s, self._link
        chunk_nbytes = self.queue.settings.next_nbytes(load)
        offset, busy_s, end_s = load.copied_nbytes, 0.0, 0.0
        if offset == 0:
            # As on a GPU: when it was handed over, though bytes before it may still be under way.
            load.begin_s = self.next_choice_s()
        while offset < load.nbytes and (choice_s := self.next_choice_s()) <= now_s:
            while arrivals_s and arrivals_s[0] <= choice_s:
                arrivals_s.popleft()
            nbytes = min(chunk_nbytes, load.nbytes - offset)
            begin_s = max(choice_s, arrivals_s[-1]) if arrivals_s else choice_s
            end_s = begin_s + link.copy_s(nbytes)
            arrivals_s.append(end_s)
            self._decided_s = choice_s
            offset += nbytes
            busy_s += end_s - begin_s
        chunk = self.queue.next_chunk(offset - load.copied_nbytes)
        assert chunk is not None, "the load is queued"
        load.end_s = end_s
        self.meter.add(chunk.nbytes, busy_s)
        if self._copy is not None:
            self._copy(chunk)
        self.queue.issued(ClockedTicket(self._clock, end_s, link.wake_s))
