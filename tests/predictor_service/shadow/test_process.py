"""A shadow's process ends with who started it, whatever its candidate is at."""

import fcntl
import socket
import struct
import termios
from pathlib import Path

import pytest

from predictor_service.shadow.process import ShadowSource, _launch
from promoe.packet_channel import PacketChannel
from tests.packs import write_synthetic_pack
from tests.plugin_folder import environment_with, install_plugins
from tests.predictor_service.shadow.test_feed_client import begin, observe
from tests.running_store import wait_until


def test_a_candidate_that_hangs_ends_with_a_service_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment_with(install_plugins(tmp_path / "plugins"))["PYTHONPATH"])
    write_synthetic_pack(tmp_path / "pack", layers=5)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports, told = socket.socketpair()
    with there, told:
        process = _launch(ShadowSource(tmp_path / "pack", None), "hanging", there.fileno(), told.fileno())
    channel = PacketChannel(here)
    for packet in (begin(1), observe(1, 0, [1, 2])):
        assert channel.send(packet)
    wait_until(lambda: _unread_nbytes(here) == 0, 30)
    # As the kernel does for who is killed.
    reports.close()
    channel.close()
    assert process.wait(10) == 0


def _unread_nbytes(connection: socket.socket) -> int:
    """Of what was sent here, that the other end has not read."""

    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0])
