"""Chunks that the link was given and that have not arrived, and how fast they arrive.

Used by the transfer thread only; others may read the meter at any time.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from compute_node.device.seam import CopyTicket

HALF_LIFE_S: Final = 0.25
"""Of busy time, after which a measured rate counts half."""


@dataclass
class LinkMeter:
    """The link's rate while it is busy: bytes and busy seconds, both weighted down with age.

    Attributes:
        busy_s: since the start.
    """

    busy_s: float = 0.0
    _bytes_per_s: float | None = None
    _recent_nbytes: float = 0.0
    _recent_s: float = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """None before anything arrived."""
        return self._bytes_per_s

    def add(self, nbytes: int, seconds: float) -> None:
        """The link was busy for so long and moved so much."""
        if seconds <= 0:
            return
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._recent_nbytes = self._recent_nbytes * kept + nbytes
        self._recent_s = self._recent_s * kept + seconds
        self.busy_s += seconds
        self._bytes_per_s = self._recent_nbytes / self._recent_s


class ChunksInFlight:
    """At most `max_chunks` copies, in the order they were handed to the link, in which they arrive."""

    def __init__(self, max_chunks: int, meter: LinkMeter) -> None:
        self._max_chunks = max_chunks
        self._meter = meter
        self._chunks: deque[tuple[CopyTicket, int]] = deque()
        # The link has been busy since then, and these bytes of it arrived unmeasured.
        self._busy_since_s = 0.0
        self._unmeasured_nbytes = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, ticket: CopyTicket, nbytes: int, begin_s: float) -> None:
        """A chunk that was handed to the link at `begin_s` (`time.perf_counter`)."""
        if ticket.is_done() and not self._chunks:
            self._meter.add(nbytes, time.perf_counter() - begin_s)
            return
        if not self._chunks:
            self._busy_since_s = begin_s
        self._chunks.append((ticket, nbytes))

    def await_room(self) -> None:
        """Blocks until one more chunk may be handed over."""
        while len(self._chunks) >= self._max_chunks:
            self.await_oldest()

    def await_oldest(self) -> None:
        """Blocks until the oldest chunk has arrived."""
        ticket, nbytes = self._chunks.popleft()
        self._unmeasured_nbytes += nbytes
        was_done = ticket.is_done()
        ticket.wait_on_host()
        # Nobody saw when a chunk arrived that was done before: it is measured together with the next one.
        if not was_done or not self._chunks:
            now_s = time.perf_counter()
            self._meter.add(self._unmeasured_nbytes, now_s - self._busy_since_s)
            self._busy_since_s, self._unmeasured_nbytes = now_s, 0

    def await_all(self) -> None:
        """Blocks until nothing is under way."""
        while self._chunks:
            self.await_oldest()
