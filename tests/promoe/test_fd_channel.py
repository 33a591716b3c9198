"""Packets of the descriptor side-channel: whatever comes is a packet or an error, and no descriptor leaks."""

import gc
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.errors import InvalidInput, Unavailable
from promoe.fd_channel import FdOp, FdPacket, receive_packet, send_packet

TEXT = st.text(max_size=100)
PACKETS = st.builds(FdPacket, st.sampled_from(FdOp), TEXT, TEXT, TEXT)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.settimeout(5)
    return near, far


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    gc.collect()  # what other tests left to the collector is not a leak of these
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@given(PACKETS, st.booleans())
def test_a_packet_arrives_as_it_was_sent(packet: FdPacket, with_fd: bool) -> None:
    near, far = channel_pair()
    with near, far, Path(os.devnull).open() as file:
        send_packet(near, packet, file.fileno() if with_fd else None)
        received, fd = receive_packet(far)
        assert received == packet
        assert (fd is not None) == with_fd
        if fd is not None:
            assert os.path.samestat(os.fstat(fd), os.fstat(file.fileno()))
            assert not os.get_inheritable(fd)
            os.close(fd)


GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=5000),
    st.recursive(st.none() | st.booleans() | st.integers() | TEXT, st.lists).map(lambda d: json.dumps(d).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            "op": st.sampled_from([op.value for op in FdOp]) | TEXT | st.lists(st.integers()),
            "arena_uuid": st.integers() | TEXT,
            "node_instance_id": st.none() | TEXT,
        },
    ).map(lambda document: json.dumps(document).encode()),
    st.just(b"[" * 4000),
)


@given(GARBAGE, st.integers(0, 6))
def test_garbage_is_refused_and_its_descriptors_closed(payload: bytes, num_fds: int) -> None:
    near, far = channel_pair()
    with near, far, Path(os.devnull).open() as file:
        socket.send_fds(near, [payload], [file.fileno()] * num_fds)
        with pytest.raises(InvalidInput):
            receive_packet(far)


def test_a_reason_of_any_length_arrives() -> None:
    near, far = channel_pair()
    with near, far:
        send_packet(near, FdPacket(FdOp.REFUSED, reason="\u2014" * 100_000))
        packet, _ = receive_packet(far)
        assert packet.reason == "\u2014" * 500


def test_more_than_one_descriptor_is_not_of_this_protocol() -> None:
    near, far = channel_pair()
    with near, far, Path(os.devnull).open() as file:
        whole = json.dumps({"op": "adopt", "arena_uuid": "", "node_instance_id": "", "reason": ""}).encode()
        socket.send_fds(near, [whole], [file.fileno()] * 2)
        with pytest.raises(InvalidInput, match="longer than any"):
            receive_packet(far)


def test_a_closed_peer_is_unavailable() -> None:
    near, far = channel_pair()
    with far:
        near.close()
        with pytest.raises(Unavailable, match="closed"):
            receive_packet(far)
