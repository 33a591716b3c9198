"""Chunks that the link was given and that have not arrived, and how fast the link has been lately.

Used by the transfer thread only; others may read the meter at any time.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from compute_node.copy_ticket import CopyTicket

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

    def __init__(self, max_chunks: int) -> None:
        self._max_chunks = max_chunks
        self._tickets: deque[CopyTicket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: CopyTicket) -> None:
        """A chunk that was handed to the link."""
        if self._tickets or not ticket.is_done():
            self._tickets.append(ticket)

    def await_room(self) -> None:
        """Blocks until one more chunk may be handed over."""
        while len(self._tickets) >= self._max_chunks:
            self.await_oldest()

    def await_oldest(self) -> None:
        """Blocks until the oldest chunk has arrived."""
        self._tickets.popleft().wait_on_host()

    def await_all(self) -> None:
        """Blocks until nothing is under way."""
        while self._tickets:
            self.await_oldest()
