"""The transfer engine: one thread owns the link and moves experts into slots, chunk by chunk.

Knows addresses and bytes, not experts' meaning and not slots' states. Stream priorities do nothing for copies, so
the order is kept in a `LoadQueue`: few chunks in flight, the rest waits where it can still be changed.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from compute_node.chunks_in_flight import ChunksInFlight, LinkMeter
from compute_node.device.seam import Link
from compute_node.load_queue import Chunk, ChunkSettings, LoadQueue
from compute_node.loads import Load, LoadState
from compute_node.transfer_stats import TransferStats
from promoe.errors import PromoeError, Unavailable
from promoe.ids import ExpertId

logger = logging.getLogger(__name__)


class TransferEngine:
    """`Transfers` over a real link.

    The lock is held for bookkeeping only; copies and waits for them happen outside of it.

    Args:
        open_link: called once on the transfer thread, which alone uses the link.
        chunks: how loads are cut.
    """

    def __init__(self, open_link: Callable[[], Link], chunks: ChunkSettings) -> None:
        self._open_link = open_link
        self._condition = threading.Condition()
        self._queue = LoadQueue(chunks)
        self._meter = LinkMeter()
        self._in_flight = ChunksInFlight(chunks.max_in_flight)
        self._closing = False
        self._has_died = False
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="promoe-transfer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Drops what is queued and ends the thread; no copy is under way after this."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> "TransferEngine":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def catch_up(self) -> None:
        """The thread is up to now."""

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        with self._condition:
            self._queue.submit(loads)
            self._condition.notify_all()

    def promote(self, load: Load) -> None:
        """See `Transfers`."""
        with self._condition:
            self._queue.promote(load)

    def pause(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        with self._condition:
            self._queue.pause(loads)

    def settle(self, loads: Sequence[Load]) -> None:
        """See `Transfers`; at once where the engine is closed or has died, which ends with no copy under way."""
        with self._condition:
            assert all(load not in self._queue for load in loads), "a load is paused before it is settled"
            self._condition.wait_for(lambda: self._closing or self._load_under_way() not in loads)
        for load in loads:
            load.ticket.wait_on_host()

    def settle_expert(self, expert: ExpertId) -> None:
        """See `Transfers`."""
        with self._condition:
            self._condition.wait_for(lambda: self._closing or not self._is_under_way(expert))

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """See `Transfers`.

        Raises:
            PromoeError: why a load failed; Unavailable where the engine is closed.
        """
        with self._condition:
            while True:
                for load in loads:
                    if load.state is LoadState.FAILED:
                        assert load.error is not None, "a failed load says why"
                        raise load.error
                issued = [load for load in loads if load.state is LoadState.ISSUED]
                if issued:
                    return min(issued, key=lambda load: load.end_s)
                # Not an error that only ends the step: none would succeed, so the engine has to end and be replaced.
                assert not self._has_died, "the transfer thread died; the log has its traceback"
                if self._closing:
                    raise Unavailable("The transfer engine is closed.")
                self._condition.wait()

    def queued_nbytes(self) -> int:
        """See `Transfers`."""
        with self._condition:
            return self._queue.queued_nbytes

    def link_bytes_per_s(self) -> float | None:
        """See `Transfers`; by the link's own measure of the chunks that have arrived."""
        return self._meter.bytes_per_s

    @property
    def link_description(self) -> str:
        """How experts travel; waits for the thread to have opened the link."""
        with self._condition:
            self._condition.wait_for(lambda: self._link is not None or self._closing)
            return self._link.description if self._link is not None else "closed"

    def stats(self) -> TransferStats:
        """Counters since the start."""
        with self._condition:
            by_reason = self._queue.moved_nbytes
            return TransferStats(sum(by_reason.values()), self._meter.busy_s, by_reason)

    def _run(self) -> None:
        try:
            link = self._open_link()
            with self._condition:
                self._link = link
                self._condition.notify_all()
            while (chunk := self._next_chunk(link)) is not None:
                self._copy(link, chunk)
            # Memory at either end may be freed as soon as the thread is gone.
            self._in_flight.await_all()
            self._measure(link)
        finally:
            # Whatever ended the thread, nobody waits for it any longer.
            with self._condition:
                self._has_died = not self._closing
                self._closing = True
                self._condition.notify_all()

    def _next_chunk(self, link: Link) -> Chunk | None:
        """What to move now, chosen as late as possible; None when the engine is closed."""
        self._in_flight.await_room()
        while True:
            self._measure(link)
            with self._condition:
                if self._closing:
                    return None
                if (chunk := self._queue.next_chunk()) is not None:
                    return chunk
                if not self._in_flight:
                    self._condition.wait()
                    continue
            # Nothing to do: see what is under way arrive, which tells the link's rate.
            self._in_flight.await_oldest()

    def _copy(self, link: Link, chunk: Chunk) -> None:
        """Hands the chunk to the link and says so."""
        load = chunk.load
        begin_s = time.perf_counter()
        if chunk.offset == 0:
            load.begin_s = begin_s
        try:
            if chunk.begins and not load.after.is_done():
                link.order_after(load.after)
            ticket = link.copy(
                load.destination_address + chunk.offset, load.source_address + chunk.offset, chunk.nbytes
            )
        except PromoeError as error:
            logger.error("Loading %s failed: %s", load.expert, error)
            with self._condition:
                self._queue.failed(error)
                self._condition.notify_all()
            return
        self._in_flight.add(ticket)
        self._measure(link)
        with self._condition:
            load.end_s = time.perf_counter()
            # Who waits, waits for a load's end, or for the link to have done with a paused one.
            if self._queue.issued(ticket) or load.state is not LoadState.COPYING:
                self._condition.notify_all()

    def _measure(self, link: Link) -> None:
        use = link.take_use()
        self._meter.add(use.nbytes, use.busy_s)

    def _load_under_way(self) -> Load | None:
        chunk = self._queue.chunk_under_way
        return None if chunk is None else chunk.load

    def _is_under_way(self, expert: ExpertId) -> bool:
        load = self._load_under_way()
        return load is not None and load.expert == expert
