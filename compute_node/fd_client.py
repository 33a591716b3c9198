"""The node's end of the descriptor side-channel: gets the arena, or hands it back to a store that lost it."""

import os
import socket
from dataclasses import dataclass

from promoe.errors import InvalidInput, Unavailable
from promoe.fd_channel import FD_CHANNEL_DEADLINE_S, FdOp, FdPacket, receive_packet, send_packet


@dataclass(frozen=True)
class HeldArena:
    """The arena that this node has mapped."""

    uuid: str
    fd: int


def request_arena(socket_path: str, node_instance_id: str, held: HeldArena | None) -> tuple[FdPacket, int | None]:
    """One exchange with the store.

    Returns:
        The store's last word and the descriptor with it, which the caller owns: ARENA (with a descriptor), SAME,
        WAIT, or REFUSED when the store does not go on with the arena that was handed back.

    Raises:
        InvalidInput: the store refuses this node, or speaks nonsense.
        Unavailable: the store is not there or went away.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(FD_CHANNEL_DEADLINE_S)
        try:
            channel.connect(socket_path)
            send_packet(channel, FdPacket(FdOp.HELLO, held.uuid if held else "", node_instance_id))
            packet, fd = receive_packet(channel)
            if packet.op is FdOp.REFUSED:
                raise InvalidInput(f"The expert store refuses this process: {packet.reason}")
            if packet.op is FdOp.OFFER and held is not None:
                send_packet(channel, FdPacket(FdOp.ADOPT, held.uuid, node_instance_id), held.fd)
                packet, fd = receive_packet(channel)
        except OSError as error:
            raise Unavailable(
                f"The expert store does not answer at {socket_path} ({error.strerror or 'timed out'})."
            ) from error
    expected = (FdOp.ARENA, FdOp.SAME, FdOp.WAIT, FdOp.REFUSED)
    if packet.op not in expected or (fd is not None) != (packet.op is FdOp.ARENA):
        if fd is not None:
            os.close(fd)
        raise InvalidInput(f"The expert store answered {packet.op.value} where it cannot.")
    return packet, fd
