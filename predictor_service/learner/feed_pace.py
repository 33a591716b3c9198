"""How long a reader may leave a socket alone: packets that come one by one each wake it, and take a processor from
somebody; but what does not fit into the socket is lost.
"""

from typing import Final

LONGEST_REST_S: Final = 0.02
SHARE_OF_BUFFER: Final = 0.125
"""Packets take up to twice their size there, and a burst comes faster than was measured."""

_FIRST_BYTES_PER_S: Final = 64e6
_FADING: Final = 0.999
"""Of the fastest rate, from one turn to the next: seconds, where little comes."""

_SHORTEST_TURN_S: Final = 1e-3


class FeedPace:
    """Goes by the fastest rate of late.

    Args:
        buffer_nbytes: of the socket.
        now_s: the reader's clock.
    """

    def __init__(self, buffer_nbytes: int, now_s: float) -> None:
        self._room_nbytes = SHARE_OF_BUFFER * buffer_nbytes
        self._bytes_per_s = _FIRST_BYTES_PER_S
        self._last_s = now_s

    def rest_s(self, read_nbytes: int, now_s: float) -> float:
        """After a turn in which so much was read."""
        took_s = max(_SHORTEST_TURN_S, now_s - self._last_s)
        self._last_s = now_s
        self._bytes_per_s = max(read_nbytes / took_s, _FADING * self._bytes_per_s)
        return min(LONGEST_REST_S, self._room_nbytes / self._bytes_per_s)
