"""The unix side-channel that carries the arena's file descriptor, and nothing else: SOCK_SEQPACKET, JSON packets.

    node                        store
    hello(uuid it has, or "")
                                arena(uuid) + fd    take this one
                                same(uuid)          keep what you have mapped
                                wait                there is none yet; come again
                                refused(reason)
                                offer               the store restarted without its arena: hand yours back
    adopt(uuid) + fd
                                same(uuid) | refused(reason): detach, then come again

One exchange per connection.
"""

import json
import os
import socket
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Final

from promoe.errors import InvalidInput, Unavailable

_MAX_PACKET_NBYTES: Final = 4096
_MAX_REASON_LENGTH: Final = 500
_MAX_FDS: Final = 4

FD_CHANNEL_DEADLINE_S: Final = 5.0
"""One packet either way; the peer answers from memory."""


class FdOp(Enum):
    """What a packet says; see the module's docstring."""

    HELLO = "hello"
    ADOPT = "adopt"
    ARENA = "arena"
    SAME = "same"
    WAIT = "wait"
    OFFER = "offer"
    REFUSED = "refused"


@dataclass(frozen=True)
class FdPacket:
    """One packet.

    Attributes:
        op: what it says.
        arena_uuid: the arena it is about, or "".
        node_instance_id: in a hello, the same as in the `Attach` call.
        reason: in a refusal, one sentence.
    """

    op: FdOp
    arena_uuid: str = ""
    node_instance_id: str = ""
    reason: str = ""


def send_packet(channel: socket.socket, packet: FdPacket, fd: int | None = None) -> None:
    """Sends one packet, with a descriptor if given.

    Raises:
        OSError: the peer is gone or does not read.
    """
    document = {
        "op": packet.op.value,
        "arena_uuid": packet.arena_uuid,
        "node_instance_id": packet.node_instance_id,
        # JSON may write six bytes for a character, and a packet that is cut cannot be read at all.
        "reason": packet.reason[:_MAX_REASON_LENGTH],
    }
    socket.send_fds(channel, [json.dumps(document).encode()], [] if fd is None else [fd])


def receive_packet(channel: socket.socket) -> tuple[FdPacket, int | None]:
    """One packet and the descriptor that came with it, which the caller closes.

    Raises:
        Unavailable: the peer closed.
        InvalidInput: what came is not a packet of this protocol; descriptors in it are closed.
        OSError: as the socket says (no packet within its timeout, connection reset).
    """
    fds = array("i")
    # Not socket.recv_fds: Python 3.11's ignores its flags, and every child process would inherit the arena.
    payload, ancillary, flags, _ = channel.recvmsg(
        _MAX_PACKET_NBYTES, socket.CMSG_LEN(_MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    with ExitStack() as undo:
        for fd in fds:
            undo.callback(os.close, fd)
        if not payload:
            raise Unavailable("The peer closed the descriptor channel.")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
            raise InvalidInput("A packet on the descriptor channel is longer than any of this protocol.")
        packet = _decode(payload)
        undo.pop_all()
    return packet, fds[0] if fds else None


def _decode(payload: bytes) -> FdPacket:
    try:
        document = json.loads(payload)
        op = FdOp(document["op"])
        texts = [document[key] for key in ("arena_uuid", "node_instance_id", "reason")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(f"A packet on the descriptor channel cannot be read ({type(error).__name__}).") from error
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInput("A packet on the descriptor channel has a field that is not text.")
    return FdPacket(op, *texts)
