"""Unix packet sockets, which carry a predictor session's messages between two processes of one host without gRPC.

A packet is a message of `Predict` as it would be on the stream. Sending is one system call and never waits: what the
kernel has no room for is not sent, and the caller counts it.
"""

import errno
import os
import socket
from pathlib import Path
from typing import Final

from promoe.errors import InvalidInput, ResourceExhausted, Unavailable

LARGEST_PACKET_NBYTES: Final = 256 << 10
"""Either way; what is larger is no message of this protocol."""

_BUFFER_NBYTES: Final = 2 * LARGEST_PACKET_NBYTES
"""Asked of the kernel for what waits to be read; it gives less where its limits are lower."""

_NO_ROOM: Final = (errno.EMSGSIZE, errno.ENOBUFS)
"""What the kernel says of a packet that its limits have no room for at all."""

_SUFFIX: Final = ".packets"


def packet_path(endpoint: str) -> Path | None:
    """Where the packet socket of a service at a gRPC endpoint is; None for one that is not on a unix socket."""
    return Path(endpoint.removeprefix("unix:") + _SUFFIX) if endpoint.startswith("unix:") else None


def listen_for_packets(path: Path, backlog: int) -> socket.socket:
    """A listener in place of a dead one's; the caller holds the lock of the gRPC socket beside it.

    Raises:
        ResourceExhausted: the socket cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        path.chmod(0o660)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ResourceExhausted(f"The socket {path} cannot be made ({error.strerror or error}).") from error
    return listener


class PacketChannel:
    """One connection. Not safe for several threads at once, but for `shut_down` and `stop_receiving`.

    Args:
        connection: connected; closed with this channel.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_NBYTES)
        # Made once: a buffer of this size for every packet would be fetched from the system anew each time.
        self._buffer = bytearray(LARGEST_PACKET_NBYTES)
        self._view = memoryview(self._buffer)

    @property
    def buffer_nbytes(self) -> int:
        """That the system keeps for what was sent and not received; its own administration counts."""
        return self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    @classmethod
    def connect(cls, path: Path, timeout_s: float) -> "PacketChannel":
        """Raises Unavailable when nobody listens there, or lets nobody in in time."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(timeout_s)
            connection.connect(os.fspath(path))
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise Unavailable(f"{path} cannot be connected to ({error.strerror or error})") from error
        return cls(connection)

    def fileno(self) -> int:
        """For polling."""
        return self._connection.fileno()

    def send(self, message: bytes) -> bool:
        """Sends one message, or returns False when there is no room for it.

        Raises:
            Unavailable: the peer is gone.
        """
        try:
            self._connection.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            raise Unavailable(f"The peer is gone ({error.strerror or error}).") from error
        return True

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next message; None when there is none within the time. `timeout_s`: 0 for not waiting, None for ever.

        Raises:
            Unavailable: the peer closed, or is gone.
            InvalidInput: the packet is larger than any message.
        """
        try:
            try:
                nbytes = self._receive_into(timeout_s)
            except ConnectionResetError:
                # The peer went without having read everything. That is told first, what it said before comes after.
                nbytes = self._receive_into(0)
        except (BlockingIOError, TimeoutError):
            return None
        except OSError as error:
            raise Unavailable(f"The peer is gone ({error.strerror or error}).") from error
        if nbytes == 0:
            raise Unavailable("The other side ended the session.")
        if nbytes > len(self._buffer):
            raise InvalidInput(f"The message is too large: {nbytes} bytes; allowed: {len(self._buffer)}.")
        return bytes(self._view[:nbytes])

    def _receive_into(self, timeout_s: float | None) -> int:
        connection = self._connection
        if timeout_s == 0:
            return connection.recv_into(self._buffer, 0, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
        if timeout_s is None:
            return connection.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        # Python waits by polling then, whatever the flags say: only for as long as this call.
        connection.settimeout(timeout_s)
        try:
            return connection.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        finally:
            connection.settimeout(None)

    def shut_down(self) -> None:
        """Wakes whoever waits on either side; allowed from any thread, and twice."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the peer was quicker
            return

    def stop_receiving(self) -> None:
        """Whoever receives here is told that the peer closed; sending goes on. Allowed from any thread, and twice."""
        try:
            self._connection.shutdown(socket.SHUT_RD)
        except OSError:  # the peer was quicker
            return

    def close(self) -> None:
        """Nothing is sent or received any more."""
        self._connection.close()
