"""In which order loads move, and how many bytes at a time: no threads, no clock, no link.

Demand loads go first, in the order they were asked for; the others by rank, and among equals in the order of
submission. The order is decided anew before every chunk, so that a prefetch gives way to a demand load after the chunk
that is on the link. The transfer thread and a replay in virtual time are driven by the same queue.
"""

import heapq
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from compute_node.copy_ticket import CopyTicket
from compute_node.loads import Load, LoadState
from promoe.errors import PromoeError
from promoe.trace_events import LoadReason

DEAD_ENTRIES_KEPT: Final = 64
"""Entries of loads that left the order by rank from its middle; swept out above this and the living ones twice."""


@dataclass(frozen=True)
class ChunkSettings:
    """How loads are cut.

    Attributes:
        chunk_nbytes: unit of one copy; None: a whole expert at once.
        max_in_flight: chunks handed to the link and not arrived.
        chunks_demand: demand loads are cut, too; nothing ever goes before them, so only closing profits from it.
    """

    chunk_nbytes: int | None
    max_in_flight: int
    chunks_demand: bool = True

    def __post_init__(self) -> None:
        assert self.chunk_nbytes is None or self.chunk_nbytes > 0, "a chunk has bytes"
        assert self.max_in_flight > 0, "a link with nothing in flight moves nothing"

    def next_nbytes(self, load: Load) -> int:
        """How much of the load is moved next."""
        rest_nbytes = load.nbytes - load.copied_nbytes
        if self.chunk_nbytes is None or (load.reason is LoadReason.DEMAND and not self.chunks_demand):
            return rest_nbytes
        return min(self.chunk_nbytes, rest_nbytes)


class Chunk(NamedTuple):
    """A part of a load, on its way to the link.

    Attributes:
        reason: what the load is queued as when the chunk begins.
        offset: of its first byte in the blob.
        begins: the chunk before, if any, was another load's, or the load was paused since.
    """

    load: Load
    reason: LoadReason
    offset: int
    nbytes: int
    begins: bool


class LoadQueue:
    """Loads that are not wholly on the link. `next_chunk` and `issued` (or `failed`) alternate.

    Attributes:
        settings: how loads are cut.
    """

    def __init__(self, settings: ChunkSettings) -> None:
        self.settings = settings
        self._demand: OrderedDict[Load, None] = OrderedDict()
        # Entries of `_by_rank` that `_others` does not know (any more, or with this number) are dead.
        self._others: dict[Load, int] = {}
        self._by_rank: list[tuple[float, int, Load]] = []
        self._num_submitted = 0
        self._queued_nbytes = 0
        self._moving: Load | None = None
        self._chunk: Chunk | None = None
        self._moved_nbytes = dict.fromkeys(LoadReason, 0)

    def __len__(self) -> int:
        return len(self._demand) + len(self._others)

    def __contains__(self, load: Load) -> bool:
        return load in self._demand or load in self._others

    @property
    def queued_nbytes(self) -> int:
        """Bytes that are still to be moved; those of the chunk under way are among them."""
        return self._queued_nbytes

    @property
    def moved_nbytes(self) -> Mapping[LoadReason, int]:
        """Bytes handed to the link since the start, by what their load was queued as at that time."""
        return dict(self._moved_nbytes)

    @property
    def chunk_under_way(self) -> Chunk | None:
        """What `next_chunk` handed out last, until it is `issued` or `failed`."""
        return self._chunk

    def submit(self, loads: Sequence[Load]) -> None:
        """Queues new loads, and PAUSED ones to go on where they stopped; those that have ended meanwhile stay so."""
        for load in loads:
            assert load not in self, f"{load.expert} is queued already"
            if load.state in (LoadState.ISSUED, LoadState.FAILED):
                continue
            load.state = LoadState.QUEUED
            self._queued_nbytes += load.nbytes - load.copied_nbytes
            if load.reason is LoadReason.DEMAND:
                self._demand[load] = None
            else:
                self._num_submitted += 1
                self._others[load] = self._num_submitted
                heapq.heappush(self._by_rank, (load.rank, self._num_submitted, load))
        self._drop_dead_entries()

    def promote(self, load: Load) -> None:
        """A queued load goes behind the demand loads; any other stays what it is."""
        if load in self._others:
            del self._others[load]
            load.reason = LoadReason.DEMAND
            self._demand[load] = None

    def pause(self, loads: Sequence[Load]) -> None:
        """Takes loads out; of a chunk under way `issued` or `failed` is told all the same."""
        for load in loads:
            if load in self:
                self._take_out(load)
                load.state = LoadState.PAUSED

    def next_load(self) -> Load | None:
        """Whose turn it is; None when nothing is queued."""
        if self._demand:
            return next(iter(self._demand))
        while self._by_rank:
            _, number, load = self._by_rank[0]
            if self._others.get(load) == number:
                return load
            heapq.heappop(self._by_rank)
        return None

    def next_chunk(self, nbytes: int | None = None) -> Chunk | None:
        """Which load moves next and how much of it; None when nothing is queued.

        Args:
            nbytes: of several chunks in a row, where nothing can come between them.
        """
        assert self._chunk is None, "one chunk after the other"
        load = self.next_load()
        if load is None:
            return None
        begins = load is not self._moving
        if begins and self._moving is not None and self._moving in self:
            self._moving.state = LoadState.QUEUED
        self._moving = load
        load.state = LoadState.COPYING
        if nbytes is None:
            nbytes = self.settings.next_nbytes(load)
        self._chunk = Chunk(load, load.reason, load.copied_nbytes, nbytes, begins)
        return self._chunk

    def issued(self, ticket: CopyTicket) -> bool:
        """The link has the chunk. True when it was its load's last one, which is ISSUED then, paused or not.

        Args:
            ticket: says when the chunk's bytes are there.
        """
        chunk = self._end_chunk()
        load = chunk.load
        self._moved_nbytes[chunk.reason] += chunk.nbytes
        if load in self:
            self._queued_nbytes -= chunk.nbytes
        load.copied_nbytes += chunk.nbytes
        load.ticket = ticket
        if load.copied_nbytes < load.nbytes:
            return False
        self._take_out(load)
        # Last, because other threads read it without a lock and go on to the ticket.
        load.state = LoadState.ISSUED
        return True

    def failed(self, error: PromoeError) -> None:
        """The link refused the chunk: its load is FAILED."""
        load = self._end_chunk().load
        self._take_out(load)
        load.error = error
        load.state = LoadState.FAILED

    def check_integrity(self) -> None:
        """Asserts what must hold between two calls; called in tests."""
        queued = [*self._demand, *self._others]
        assert len(set(queued)) == len(queued), "a load is queued once"
        assert self._queued_nbytes == sum(load.nbytes - load.copied_nbytes for load in queued), "bytes are conserved"
        for load in queued:
            assert (load.reason is LoadReason.DEMAND) == (load in self._demand), "demand loads have their own queue"
            assert load.state in (LoadState.QUEUED, LoadState.COPYING), f"{load.expert} is queued and {load.state}"
            assert load.state is LoadState.QUEUED or load is self._moving, "one load is being copied"
        living = {load for _, number, load in self._by_rank if self._others.get(load) == number}
        assert living == set(self._others), "every prefetch has its place in the order"

    def _drop_dead_entries(self) -> None:
        if len(self._by_rank) > 2 * len(self._others) + DEAD_ENTRIES_KEPT:
            self._by_rank = [entry for entry in self._by_rank if self._others.get(entry[2]) == entry[1]]
            heapq.heapify(self._by_rank)

    def _end_chunk(self) -> Chunk:
        chunk = self._chunk
        assert chunk is not None, "a chunk is under way"
        self._chunk = None
        return chunk

    def _take_out(self, load: Load) -> None:
        if load in self:
            self._queued_nbytes -= load.nbytes - load.copied_nbytes
            self._demand.pop(load, None)
            self._others.pop(load, None)
        if self._moving is load:
            self._moving = None
