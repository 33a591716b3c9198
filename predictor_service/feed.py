"""Lets other processes listen to what the nodes show and what they are answered, without ever waiting for them.

A packet per message of a session; what a listener has no room for is not sent, and counted. Knows no messages:

    session, 8 bytes | nbytes of what the node said, 4 bytes | what it said | what it was answered, if anything

A packet in which neither says anything is a session's end. Little-endian.
"""

import logging
import struct
import threading
from dataclasses import dataclass
from typing import Final

from promoe.errors import InvalidInput, Unavailable
from promoe.packet_channel import PacketChannel

logger = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<QI")


@dataclass(frozen=True)
class Overheard:
    """One packet.

    Attributes:
        session: whose; numbers are not used again.
        said: a PredictRequest, encoded; empty at the session's end.
        answer: a PredictResponse, encoded; empty where there was none.
    """

    session: int
    said: bytes
    answer: bytes = b""

    def encode(self) -> bytes:
        """As a packet."""
        return _HEADER.pack(self.session, len(self.said)) + self.said + self.answer

    @classmethod
    def decode(cls, packet: bytes) -> "Overheard":
        """Raises InvalidInput for what is none."""
        if len(packet) < _HEADER.size:
            raise InvalidInput(f"A packet of {len(packet)} bytes is none of the feed's.")
        session, nbytes = _HEADER.unpack_from(packet)
        said = packet[_HEADER.size : _HEADER.size + nbytes]
        if len(said) < nbytes:
            raise InvalidInput(f"A packet says {nbytes} bytes and has {len(said)}.")
        return cls(session, said, packet[_HEADER.size + nbytes :])


class Feed:
    """Told by the sessions' threads; listeners come and go from others."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._listeners: tuple[PacketChannel, ...] = ()
        self.num_unsent = 0

    @property
    def has_listeners(self) -> bool:
        """Somebody wants to hear."""
        return bool(self._listeners)

    def add(self, listener: PacketChannel) -> None:
        """From now on; it is closed by who made it."""
        with self._changing:
            self._listeners = (*self._listeners, listener)

    def remove(self, listener: PacketChannel) -> None:
        """Removing twice is allowed."""
        with self._changing:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

    def tell(self, session: int, said: bytes, answer: bytes) -> None:
        """Never waits and never fails: a listener that is gone is forgotten."""
        packet = Overheard(session, said, answer).encode()
        for listener in self._listeners:
            try:
                if not listener.send(packet):
                    self.num_unsent += 1
            except Unavailable:
                self.remove(listener)

    def end(self, session: int) -> None:
        """The session is over."""
        self.tell(session, b"", b"")
