"""Serves the descriptor side-channel: who may have the arena, and taking it back after a crash.

One exchange per connection, each bounded in time, so that a silent or garbled peer holds up nobody.
"""

import asyncio
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Final

from expert_store.store import ExpertStore, Phase
from promoe.errors import InvalidInput, PromoeError, ResourceExhausted, Unavailable
from promoe.fd_channel import FD_CHANNEL_DEADLINE_S, FdOp, FdPacket, receive_packet, send_packet

logger = logging.getLogger(__name__)

_PEER_CREDENTIALS: Final = struct.Struct("3i")
_MAX_CONNECTIONS: Final = 64
_ACCEPT_RETRY_S: Final = 0.5


class FdServer:
    """The listener; made before the store is announced anywhere.

    Args:
        path: of the unix socket; a dead store's socket there is replaced (the run folder's lock is held).
        peer_uids: users that may have the arena.

    Raises:
        ResourceExhausted: the socket cannot be made.
    """

    def __init__(self, path: Path, store: ExpertStore, peer_uids: frozenset[int]) -> None:
        self._store = store
        self._peer_uids = peer_uids
        self._path = path
        self._connections: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(os.fspath(path))
            path.chmod(0o660)
            self._listener.listen(_MAX_CONNECTIONS)
        except OSError as error:
            self._listener.close()
            raise ResourceExhausted(f"The socket {path} cannot be made ({error.strerror}).") from error

    async def run(self) -> None:
        """Answers until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    channel, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    # Out of descriptors: nodes that are attached go on, and new ones come again.
                    logger.error("The descriptor channel cannot accept (%s).", error.strerror)
                    await asyncio.sleep(_ACCEPT_RETRY_S)
                    continue
                if len(self._connections) >= _MAX_CONNECTIONS:
                    channel.close()
                    continue
                connection = asyncio.create_task(self._serve(channel))
                self._connections.add(connection)
                connection.add_done_callback(self._connections.discard)
        finally:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, channel: socket.socket) -> None:
        with channel:
            channel.setblocking(False)
            pid, uid, _ = _PEER_CREDENTIALS.unpack(
                channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            )
            try:
                async with asyncio.timeout(FD_CHANNEL_DEADLINE_S):
                    hello = await _receive_without_fd(channel, FdOp.HELLO)
                    # Only now: a peer that was refused before it spoke would find a closed socket and no reason.
                    if uid not in self._peer_uids:
                        raise InvalidInput(f"User {uid} may not attach to this store; see store.allowed_uids.")
                    await self._answer(channel, hello, pid)
            except Unavailable:
                pass  # The peer closed: nothing to say and nobody to say it to.
            except (OSError, TimeoutError) as error:
                logger.warning("Process %d (user %d) left the descriptor channel: %r", pid, uid, error)
            except PromoeError as error:
                logger.warning("Refused process %d (user %d): %s", pid, uid, error)
                _try_send(channel, FdPacket(FdOp.REFUSED, reason=str(error)))

    async def _answer(self, channel: socket.socket, hello: FdPacket, pid: int) -> None:
        self._store.note_peer(hello.node_instance_id, pid)
        if self._store.phase is Phase.ADOPTING and hello.arena_uuid:
            send_packet(channel, FdPacket(FdOp.OFFER))
            await self._take_back(channel)
            return
        arena = self._store.arena
        if arena is None:
            send_packet(channel, FdPacket(FdOp.WAIT))
        elif arena.uuid == hello.arena_uuid:
            send_packet(channel, FdPacket(FdOp.SAME, arena.uuid))
        else:
            send_packet(channel, FdPacket(FdOp.ARENA, arena.uuid), arena.fd)

    async def _take_back(self, channel: socket.socket) -> None:
        packet, fd = await _receive(channel)
        if packet.op is not FdOp.ADOPT or fd is None:
            if fd is not None:
                os.close(fd)
            raise InvalidInput("A node that was asked for the arena sent something else.")
        arena = self._store.arena
        if self._store.phase is Phase.ADOPTING:
            self._store.adopt(fd)
            arena = self._store.arena
        else:
            # Another node was quicker; if it held the same arena, this one keeps what it has.
            os.close(fd)
        if arena is None:
            raise Unavailable("The store is going down.")
        if arena.uuid != packet.arena_uuid:
            raise InvalidInput(f"The store goes on with arena {arena.uuid}, not with {packet.arena_uuid}.")
        send_packet(channel, FdPacket(FdOp.SAME, arena.uuid))


async def _receive_without_fd(channel: socket.socket, wanted: FdOp) -> FdPacket:
    packet, fd = await _receive(channel)
    if fd is not None:
        os.close(fd)
        raise InvalidInput(f"A descriptor came with a {packet.op.value} packet.")
    if packet.op is not wanted:
        raise InvalidInput(f"Expected a {wanted.value} packet, got {packet.op.value}.")
    return packet


async def _receive(channel: socket.socket) -> tuple[FdPacket, int | None]:
    await _readable(channel)
    return receive_packet(channel)


async def _readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(channel, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(channel)


def _try_send(channel: socket.socket, packet: FdPacket) -> None:
    try:
        send_packet(channel, packet)
    except OSError as error:
        logger.debug("The refusal could not be sent: %s", error)
