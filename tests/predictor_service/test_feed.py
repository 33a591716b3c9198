"""Listeners hear everything they have room for, and nobody waits for them."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.feed import Feed, Overheard
from promoe.errors import InvalidInput
from promoe.packet_channel import PacketChannel


@pytest.fixture
def ends() -> Iterator[tuple[PacketChannel, socket.socket]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as stack:
        stack.enter_context(there)
        channel = PacketChannel(here)
        stack.callback(channel.close)
        yield channel, there


@given(st.integers(0, (1 << 64) - 1), st.binary(), st.binary())
def test_a_packet_is_what_was_said_and_answered(session: int, said: bytes, answer: bytes) -> None:
    overheard = Overheard(session, said, answer)
    assert Overheard.decode(overheard.encode()) == overheard


@given(st.binary(max_size=40))
def test_what_is_no_packet_is_refused_or_read(packet: bytes) -> None:
    try:
        assert Overheard.decode(packet).encode() == packet
    except InvalidInput:
        assert len(packet) < 12 or int.from_bytes(packet[8:12], "little") > len(packet) - 12


def test_it_is_heard_while_somebody_listens(ends: tuple[PacketChannel, socket.socket]) -> None:
    channel, there = ends
    feed = Feed()
    assert not feed.has_listeners
    feed.tell(1, b"before", b"")
    feed.add(channel)
    assert feed.has_listeners
    feed.tell(1, b"said", b"answered")
    feed.end(1)
    feed.remove(channel)
    feed.remove(channel)
    feed.tell(1, b"after", b"")
    assert Overheard.decode(there.recv(1 << 16)) == Overheard(1, b"said", b"answered")
    assert Overheard.decode(there.recv(1 << 16)) == Overheard(1, b"", b"")
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(1)


def test_who_does_not_read_misses_packets_and_keeps_nobody(ends: tuple[PacketChannel, socket.socket]) -> None:
    channel, _ = ends
    feed = Feed()
    feed.add(channel)
    while feed.num_unsent < 3:
        feed.tell(1, bytes(1 << 14), b"")
    assert feed.has_listeners


def test_who_is_gone_is_forgotten(ends: tuple[PacketChannel, socket.socket]) -> None:
    channel, there = ends
    feed = Feed()
    feed.add(channel)
    there.close()
    feed.tell(1, b"said", b"")
    assert not feed.has_listeners
