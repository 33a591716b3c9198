"""A load, and the seam to whoever moves it: the transfer thread, or virtual time in a replay.

Knows addresses and bytes, not slots' states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from compute_node.copy_ticket import CopyTicket
from promoe.errors import PromoeError
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason


class LoadState(Enum):
    """A load's life.

             next chunk           last chunk
        QUEUED ◄──────► COPYING ──────────────► ISSUED
         ▲  │  gave way    │ └────► FAILED        ▲
         │  └─────┐  ┌─────┘                      │
         │      pause│                            │
         │        ▼  ▼                            │
         └──────── PAUSED ────────────────────────┘
          submit            the chunk under way was the last one

    ISSUED means that the last chunk was handed to the link: `ticket` says when its bytes are there.
    """

    QUEUED = "queued"
    COPYING = "copying"
    PAUSED = "paused"
    ISSUED = "issued"
    FAILED = "failed"


@dataclass(eq=False)
class Load:
    """One expert on its way into one slot; written by whoever moves it, read by the expert cache.

    Attributes:
        expert: which one.
        source_address: of its blob in the mapped arena.
        destination_address: of the slot.
        nbytes: of the blob.
        after: compute that may still read what the slot held.
        ticket: of the last chunk that was handed to the link; one that is done before there is any.
        reason: DEMAND goes before everything else; the others in the order of `rank`.
        rank: among loads that are not DEMAND, the smallest is moved first.
        begin_s, end_s: `time.perf_counter` (or virtual) seconds of the first chunk's start and of the last one's end;
            where copies are asynchronous, of the moment when the last one was handed to the link.
    """

    expert: ExpertId
    source_address: int
    destination_address: int
    nbytes: int
    after: CopyTicket
    ticket: CopyTicket
    reason: LoadReason = LoadReason.DEMAND
    rank: float = 0.0
    state: LoadState = LoadState.QUEUED
    copied_nbytes: int = 0
    begin_s: float = 0.0
    end_s: float = 0.0
    error: PromoeError | None = field(default=None)

    @property
    def has_arrived(self) -> bool:
        """Its bytes can be computed with, without waiting."""
        return self.state is LoadState.ISSUED and self.ticket.is_done()


class Transfers(Protocol):
    """Moves loads over the link, chunk by chunk, demand before everything else."""

    def catch_up(self) -> None:
        """Brings loads up to now, where no thread does."""

    def submit(self, loads: Sequence[Load]) -> None:
        """Queues loads that are QUEUED or PAUSED: DEMAND ones behind the DEMAND ones before, others by rank.

        One that was PAUSED and has come to its end meanwhile (see `pause`) stays ISSUED or FAILED.
        """

    def promote(self, load: Load) -> None:
        """A QUEUED or COPYING load becomes a DEMAND load, behind those before; nothing changes for any other."""

    def pause(self, loads: Sequence[Load]) -> None:
        """Takes loads out of the queue; those that were QUEUED or COPYING are PAUSED and keep what was copied.

        Does not wait: a chunk that is under way ends all the same, its bytes are counted when it does, and if it was
        the last one its load is ISSUED then. Nothing that is submitted later can overtake it, so its slot may be given
        to another load at once; before its source or its slot is used otherwise, `settle` it.
        """

    def settle(self, loads: Sequence[Load]) -> None:
        """Blocks until the link has done with all chunks of these loads; none of them may be queued."""

    def settle_expert(self, expert: ExpertId) -> None:
        """Blocks until no chunk of the expert's blob is being handed to the link, of whatever load it was.

        None of its loads may be queued. One that was paused, and whose slot was given up, may still have a chunk under
        way that nobody knows any more. What was handed over before is waited for otherwise (`synchronize`).
        """

    def next_issued(self, loads: Sequence[Load]) -> Load:
        """Blocks until one of `loads` is ISSUED, and returns the one that became so first; none may be PAUSED.

        Raises:
            PromoeError: a load failed, or nobody moves loads any more.
        """

    def queued_nbytes(self) -> int:
        """Bytes that are still to be copied for everything that was submitted."""

    def link_bytes_per_s(self) -> float | None:
        """The link's rate while it is busy, lately; None before anything was moved."""
