"""A link that is played on a CPU: real bytes, at the rate and in the order of a device's copy engine, without a thread.

A copy engine takes no time from the CPU. A thread that plays it would: it wakes for every chunk and takes the
interpreter's lock from the engine thread, which alone cost more than the copies it hid (DECISIONS.md). Since only the
engine thread changes the queue, what the link would have done meanwhile can be worked out when it looks.
"""

import ctypes
import select
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

from compute_node.clocked_transfers import ClockedTransfers, LinkModel
from compute_node.load_queue import Chunk, ChunkSettings
from compute_node.loads import Load, LoadState
from compute_node.transfer_stats import TransferStats
from promoe.errors import Unavailable
from promoe.ids import ExpertId

AWAKE_S: Final = 0.002
"""A core that sleeps is cold when it wakes: each sleep of 0.8 ms cost the computing after it half a millisecond, which
no device would lose by waiting for its copy engine (DECISIONS.md). So the end of every wait is passed awake."""


class RealClock:
    """`time.perf_counter`; short waits are passed awake."""

    def __call__(self) -> float:
        """Now."""
        return time.perf_counter()

    def follow(self, follower: Callable[[], None]) -> None:
        """Real time passes without telling anybody; who looks catches up."""

    def advance_to(self, at_s: float) -> None:
        """Returns then."""
        # One of its own for each wait: two threads may wait, and may not poll with the same.
        nothing = select.poll()
        while (early_s := at_s - time.perf_counter()) > 0:
            if early_s > AWAKE_S:
                time.sleep(early_s - AWAKE_S)
            else:
                # Lets other threads have the interpreter. Sleeping for no time would, too, but makes the kernel set a
                # timer, after which the computing is slower for longer than the wait took (DECISIONS.md).
                nothing.poll(0)


class EmulatedTransfers:
    """`Transfers` over a played link; the store client's thread may come in beside the engine's.

    Args:
        bytes_per_s: of the link.
        chunks: how loads are cut.
    """

    def __init__(self, bytes_per_s: float, chunks: ChunkSettings) -> None:
        self._lock = threading.RLock()
        self._clock = RealClock()
        self._transfers = ClockedTransfers(self._clock, LinkModel(bytes_per_s), chunks, _copy)
        self._is_closed = False

    def start(self) -> None:
        """Nothing runs by itself."""

    def close(self) -> None:
        """Nothing is copied any more."""
        self._is_closed = True

    def __enter__(self) -> "EmulatedTransfers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def catch_up(self) -> None:
        """See `Transfers`."""
        with self._lock:
            self._transfers.catch_up()

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        with self._lock:
            self._transfers.catch_up()
            self._transfers.submit(loads)

    def promote(self, load: Load) -> None:
        """See `Transfers`."""
        with self._lock:
            self._transfers.catch_up()
            self._transfers.promote(load)

    def pause(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        with self._lock:
            self._transfers.catch_up()
            self._transfers.pause(loads)

    def settle(self, loads: Sequence[Load]) -> None:
        """See `Transfers`."""
        self._transfers.settle(loads)

    def settle_expert(self, expert: ExpertId) -> None:
        """See `Transfers`: a chunk is copied with the lock held, by whoever looks."""
        with self._lock:
            self._transfers.settle_expert(expert)

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """See `Transfers`.

        Raises:
            Unavailable: closed.
        """
        while True:
            with self._lock:
                if self._is_closed:
                    raise Unavailable("The transfer engine is closed.")
                self._transfers.catch_up()
                issued = [load for load in loads if load.state is LoadState.ISSUED]
                if issued:
                    return min(issued, key=lambda load: load.end_s)
                next_s = self._transfers.next_choice_s()
            self._clock.advance_to(next_s)

    def queued_nbytes(self) -> int:
        """See `Transfers`."""
        return self._transfers.queued_nbytes()

    def link_bytes_per_s(self) -> float | None:
        """See `Transfers`."""
        return self._transfers.link_bytes_per_s()

    @property
    def link_description(self) -> str:
        """How experts travel."""
        return "emulated"

    def stats(self) -> TransferStats:
        """Counters since the start."""
        with self._lock:
            moved = self._transfers.queue.moved_nbytes
            return TransferStats(sum(moved.values()), self._transfers.meter.busy_s, moved)


def _copy(chunk: Chunk) -> None:
    load = chunk.load
    ctypes.memmove(load.destination_address + chunk.offset, load.source_address + chunk.offset, chunk.nbytes)
