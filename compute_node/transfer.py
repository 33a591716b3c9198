"""The transfer engine: one thread owns the link and moves experts into slots, chunk by chunk.

Knows addresses and bytes, not experts' meaning and not slots' states. Stream priorities do nothing for copies, so
the order is kept here: few chunks in flight, the rest waits in a queue that can still be changed.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from compute_node.device.cpu import DONE
from compute_node.device.seam import CopyTicket, Link
from promoe.errors import PromoeError, Unavailable
from promoe.ids import ExpertId

logger = logging.getLogger(__name__)


class LoadState(Enum):
    """A load's life: QUEUED -> COPYING -> ISSUED, or FAILED from either of the first two.

    ISSUED means that the last chunk was handed to the link: `ticket` says when its bytes are there.
    """

    QUEUED = "queued"
    COPYING = "copying"
    ISSUED = "issued"
    FAILED = "failed"


@dataclass(eq=False)
class Load:
    """One expert on its way into one slot.

    Attributes:
        expert: which one, for messages.
        source_address: of its blob in the mapped arena.
        destination_address: of the slot.
        nbytes: of the blob.
        after: compute that may still read what the slot held.
    """

    expert: ExpertId
    source_address: int
    destination_address: int
    nbytes: int
    after: CopyTicket = DONE
    state: LoadState = LoadState.QUEUED
    copied_nbytes: int = 0
    ticket: CopyTicket = DONE
    error: PromoeError | None = field(default=None)


@dataclass(frozen=True)
class TransferStats:
    """Since the start."""

    uploaded_nbytes: int
    link_busy_s: float


class TransferEngine:
    """Demand loads in the order they are asked for.

    Args:
        open_link: called once on the transfer thread, which alone uses the link.
        chunk_nbytes: unit of one copy.
        max_chunks_in_flight: copies handed to the link and not arrived.
    """

    def __init__(self, open_link: Callable[[], Link], chunk_nbytes: int, max_chunks_in_flight: int) -> None:
        assert chunk_nbytes > 0, "a chunk has bytes"
        assert max_chunks_in_flight > 0, "a link with nothing in flight moves nothing"
        self._open_link = open_link
        self._chunk_nbytes = chunk_nbytes
        self._max_chunks_in_flight = max_chunks_in_flight
        self._condition = threading.Condition()
        self._queue: deque[Load] = deque()
        self._in_flight: deque[CopyTicket] = deque()
        self._closing = False
        self._has_died = False
        self._link: Link | None = None
        self._uploaded_nbytes = 0
        self._link_busy_s = 0.0
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

    def submit(self, loads: Sequence[Load]) -> None:
        """Queues demand loads behind those queued before."""
        with self._condition:
            self._queue.extend(loads)
            self._condition.notify_all()

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """Blocks until one of `loads` is ISSUED, and returns the first such in arrival order.

        Raises:
            Unavailable: a load failed, or the engine is closed.
        """
        with self._condition:
            while True:
                for load in loads:
                    if load.state is LoadState.FAILED:
                        assert load.error is not None, "a failed load says why"
                        raise load.error
                    if load.state is LoadState.ISSUED:
                        return load
                # Not an error that only ends the step: none would succeed, so the engine has to end and be replaced.
                assert not self._has_died, "the transfer thread died; the log has its traceback"
                if self._closing:
                    raise Unavailable("The transfer engine is closed.")
                self._condition.wait()

    def cancel(self, loads: Sequence[Load]) -> None:
        """Forgets loads; returns when none of them is being copied, so that their slots can be reused."""
        with self._condition:
            wanted = set(map(id, loads))
            self._queue = deque(load for load in self._queue if id(load) not in wanted)
            self._condition.wait_for(
                lambda: self._closing or all(load.state is not LoadState.COPYING for load in loads)
            )

    @property
    def link_description(self) -> str:
        """How experts travel; waits for the thread to have opened the link."""
        with self._condition:
            self._condition.wait_for(lambda: self._link is not None or self._closing)
            return self._link.description if self._link is not None else "closed"

    def stats(self) -> TransferStats:
        """Counters since the start."""
        with self._condition:
            return TransferStats(self._uploaded_nbytes, self._link_busy_s)

    def _run(self) -> None:
        try:
            link = self._open_link()
            with self._condition:
                self._link = link
                self._condition.notify_all()
            self._serve(link)
            # Memory at either end may be freed as soon as the thread is gone.
            for ticket in self._in_flight:
                ticket.wait_on_host()
        finally:
            # Whatever ended the thread, nobody waits for it any longer.
            with self._condition:
                self._has_died = not self._closing
                self._closing = True
                self._condition.notify_all()

    def _serve(self, link: Link) -> None:
        while (load := self._next_load()) is not None:
            error: PromoeError | None = None
            started_s = time.perf_counter()
            try:
                self._copy(link, load)
            except PromoeError as failure:
                logger.error("Loading %s failed: %s", load.expert, failure)
                error = failure
            with self._condition:
                self._link_busy_s += time.perf_counter() - started_s
                self._uploaded_nbytes += load.copied_nbytes
                load.error = error
                load.state = LoadState.FAILED if error else LoadState.ISSUED
                self._condition.notify_all()

    def _next_load(self) -> Load | None:
        with self._condition:
            while not self._queue and not self._closing:
                self._condition.wait()
            if self._closing:
                return None
            load = self._queue.popleft()
            load.state = LoadState.COPYING
            return load

    def _copy(self, link: Link, load: Load) -> None:
        """Hands the load to the link chunk by chunk; returns when the last one is on its way."""
        if not load.after.is_done():
            link.order_after(load.after)
        while load.copied_nbytes < load.nbytes:
            while len(self._in_flight) >= self._max_chunks_in_flight:
                self._in_flight.popleft().wait_on_host()
            nbytes = min(self._chunk_nbytes, load.nbytes - load.copied_nbytes)
            load.ticket = link.copy(
                load.destination_address + load.copied_nbytes, load.source_address + load.copied_nbytes, nbytes
            )
            load.copied_nbytes += nbytes
            if not load.ticket.is_done():
                self._in_flight.append(load.ticket)
