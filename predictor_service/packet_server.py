"""Listens on a unix packet socket and gives each connection a thread. Knows no messages."""

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from promoe.packet_channel import PacketChannel, listen_for_packets

logger = logging.getLogger(__name__)

_ACCEPT_RETRY_S: Final = 0.5
_JOIN_S: Final = 2.0


class PacketServer:
    """Serves until closed.

    Args:
        path: of the socket; see `listen_for_packets`.
        converse: holds one session; returns when it is over.
        max_connections: open at once; more are closed at once, and the nodes come again.

    Raises:
        ResourceExhausted: the socket cannot be made.
    """

    def __init__(self, path: Path, converse: Callable[[PacketChannel], None], max_connections: int) -> None:
        self.path = path
        self._converse = converse
        self._max_connections = max_connections
        self._listener = listen_for_packets(path, max_connections)
        self._lock = threading.Lock()
        self._open: dict[PacketChannel, threading.Thread] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept_all, name="packets", daemon=True)

    def start(self) -> None:
        """Lets nodes in."""
        self._thread.start()

    def close(self) -> None:
        """Ends every connection, after what its session still says."""
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            threads = list(self._open.values())
            for channel in self._open:
                channel.stop_receiving()
        until_s = time.perf_counter() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.perf_counter()))

    def _accept_all(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                # Out of descriptors: nodes that are connected go on, and new ones come again.
                logger.error("The packet socket cannot accept (%s).", error.strerror)
                self._closing.wait(_ACCEPT_RETRY_S)
                continue
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            if len(self._open) >= self._max_connections:
                connection.close()
                return
            try:
                channel = PacketChannel(connection)
                # A node that went away must not keep the process alive.
                thread = threading.Thread(target=self._serve, args=(channel,), name="session", daemon=True)
                thread.start()
            except (OSError, RuntimeError) as error:  # out of buffers or threads
                logger.error("A node cannot be let in over packets (%s).", error)
                connection.close()
                return
            # The thread looks for its entry when it ends, under the lock.
            self._open[channel] = thread

    def _serve(self, channel: PacketChannel) -> None:
        try:
            self._converse(channel)
        finally:
            with self._lock:
                del self._open[channel]
                channel.close()
