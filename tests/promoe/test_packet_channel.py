"""Packets over unix sockets: whole messages, never waiting to send, and an end that is told."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe.errors import InvalidInput, ResourceExhausted, Unavailable
from promoe.packet_channel import LARGEST_PACKET_NBYTES, PacketChannel, listen_for_packets, packet_path

DEADLINE_S = 20.0


@pytest.fixture
def ends() -> Iterator[tuple[PacketChannel, PacketChannel]]:
    here, there = (PacketChannel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    yield here, there
    here.close()
    there.close()


def test_messages_come_whole_and_in_order(ends: tuple[PacketChannel, PacketChannel]) -> None:
    here, there = ends
    messages = [b"a", bytes(LARGEST_PACKET_NBYTES), b"c" * 1000]
    assert here.receive(0) is None
    for message in messages:
        assert there.send(message)
    assert [here.receive(0), here.receive(DEADLINE_S), here.receive(None)] == messages
    assert here.receive(0) is None
    assert here.receive(0.001) is None
    # A wait that was bounded does not bound the next.
    threading.Timer(0.05, there.send, [b"late"]).start()
    assert here.receive(None) == b"late"


def test_what_there_is_no_room_for_is_not_sent_and_nobody_waits(ends: tuple[PacketChannel, PacketChannel]) -> None:
    here, there = ends
    num_sent = 0
    while there.send(b"%d" % num_sent):
        num_sent += 1
    assert num_sent > 64, "a step's observations have room"
    assert [here.receive(0) for _ in range(num_sent)] == [b"%d" % number for number in range(num_sent)]
    assert here.receive(0) is None
    assert there.send(b"again")


def test_what_is_larger_than_any_message_is_refused(ends: tuple[PacketChannel, PacketChannel]) -> None:
    here, there = ends
    assert there.send(bytes(LARGEST_PACKET_NBYTES + 1))
    with pytest.raises(InvalidInput, match="too large"):
        here.receive(0)


def test_an_end_is_told_after_what_was_said(ends: tuple[PacketChannel, PacketChannel]) -> None:
    here, there = ends
    here.send(b"not read by the other side")
    there.send(b"goodbye")
    there.close()
    assert here.receive(DEADLINE_S) == b"goodbye"
    with pytest.raises(Unavailable, match="ended the session"):
        here.receive(DEADLINE_S)
    with pytest.raises(Unavailable, match="gone"):
        here.send(b"hello?")


@pytest.mark.parametrize("how", ["shut_down", "stop_receiving"])
def test_who_waits_is_woken(ends: tuple[PacketChannel, PacketChannel], how: str) -> None:
    here, there = ends
    threading.Timer(0.05, getattr(here, how)).start()
    with pytest.raises(Unavailable):
        here.receive(None)
    getattr(here, how)()
    if how == "stop_receiving":
        assert here.send(b"last words")
        assert there.receive(DEADLINE_S) == b"last words"


def test_a_dead_listeners_place_is_taken_and_one_that_cannot_be_is_said(socket_dir: Path) -> None:
    path = packet_path(f"unix:{socket_dir / 'p.sock'}")
    assert path is not None
    with pytest.raises(Unavailable, match="cannot be connected to"):
        PacketChannel.connect(path, DEADLINE_S)
    listen_for_packets(path, 1).close()
    with listen_for_packets(path, 1) as listener:
        assert path.stat().st_mode & 0o777 == 0o660
        channel = PacketChannel.connect(path, DEADLINE_S)
        connection, _ = listener.accept()
        with connection:
            connection.send(b"hello")
            assert channel.receive(DEADLINE_S) == b"hello"
        channel.close()
    with pytest.raises(ResourceExhausted, match="cannot be made"):
        listen_for_packets(socket_dir / ("x" * 200), 1)


def test_only_a_unix_socket_has_packets_beside_it() -> None:
    assert packet_path("127.0.0.1:50053") is None
    assert packet_path("unix:/run/p.sock") == Path("/run/p.sock.packets")
