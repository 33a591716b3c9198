"""The packet socket's listener: a thread for each connection, a bound on them, and an orderly end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from predictor_service.packet_server import PacketServer
from promoe.errors import Unavailable
from promoe.packet_channel import PacketChannel

DEADLINE_S = 20.0


def echo(channel: PacketChannel) -> None:
    """Until the other side goes, or the server closes; then it says so."""
    try:
        while (message := channel.receive(None)) is not None:
            channel.send(message)
    except Unavailable:
        pass
    try:
        channel.send(b"bye")
    except Unavailable:
        return


@contextmanager
def serving(path: Path, max_connections: int = 2) -> Iterator[PacketServer]:
    server = PacketServer(path, echo, max_connections)
    server.start()
    try:
        yield server
    finally:
        server.close()
        assert not path.exists()


@contextmanager
def connected(path: Path) -> Iterator[PacketChannel]:
    channel = PacketChannel.connect(path, DEADLINE_S)
    try:
        yield channel
    finally:
        channel.close()


def test_connections_are_served_side_by_side(socket_dir: Path) -> None:
    path = socket_dir / "p"
    with serving(path), connected(path) as first, connected(path) as second:
        for channel, message in ((second, b"2"), (first, b"1"), (second, b"22")):
            assert channel.send(message)
            assert channel.receive(DEADLINE_S) == message


def test_more_than_allowed_are_closed_at_once_and_one_that_left_makes_room(socket_dir: Path) -> None:
    path = socket_dir / "p"
    with serving(path, max_connections=1):
        with connected(path) as first:
            first.send(b"in")
            assert first.receive(DEADLINE_S) == b"in"
            with connected(path) as second, pytest.raises(Unavailable):
                second.receive(DEADLINE_S)
        for _ in range(1000):  # until the server has seen it leave
            with connected(path) as third:
                try:
                    third.send(b"in")
                    if third.receive(DEADLINE_S) == b"in":
                        return
                except Unavailable:
                    continue
        pytest.fail("the place is never free again")


def test_closing_ends_every_connection_after_its_last_words(socket_dir: Path) -> None:
    path = socket_dir / "p"
    with serving(path) as server, connected(path) as channel:
        channel.send(b"in")
        assert channel.receive(DEADLINE_S) == b"in"
        threads = [thread for thread in threading.enumerate() if thread.name in ("packets", "session")]
        server.close = lambda: None  # type: ignore[method-assign]
        PacketServer.close(server)
        assert channel.receive(DEADLINE_S) == b"bye"
        with pytest.raises(Unavailable):
            channel.receive(DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads)
