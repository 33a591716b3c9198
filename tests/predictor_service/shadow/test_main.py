"""The shadow's own loop: garbage is left out, a candidate that fails is not."""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from predictor_service.shadow.__main__ import listen
from predictor_service.shadow.feed_client import Listener
from promoe.errors import InvalidInput
from promoe.hint import Hint, Observation, ObservedKind
from promoe.packet_channel import LARGEST_PACKET_NBYTES, PacketChannel
from tests.predictor_service.shadow.test_feed_client import Foreseeing, begin, observe
from tests.predictor_service.test_versions import NamedPredictor


class Failing(NamedPredictor):
    def __init__(self, failure: Exception) -> None:
        super().__init__("s@1", ObservedKind.NONE)
        self.failure = failure

    def observe(self, observation: Observation) -> Sequence[Hint]:
        raise self.failure


@pytest.fixture
def packets() -> Iterator[tuple[PacketChannel, PacketChannel]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(PacketChannel(here)) as one, closing(PacketChannel(there)) as other:
        yield one, other


@pytest.mark.parametrize("failure", [ValueError("a bug"), InvalidInput("a bug")])
def test_a_candidate_that_fails_is_not_taken_for_a_bad_packet(
    packets: tuple[PacketChannel, PacketChannel], failure: Exception
) -> None:
    feed, heard = packets
    for packet in (b"garbage", begin(1), observe(1, 0, [1, 2])):
        feed.send(packet)
    reports, told = socket.socketpair()
    with reports, told, pytest.raises(type(failure), match="a bug"):
        listen(heard, told, Listener(Failing(failure)))


def test_it_listens_until_the_service_hangs_up(packets: tuple[PacketChannel, PacketChannel]) -> None:
    feed, heard = packets
    too_large = b"x" * (LARGEST_PACKET_NBYTES + 1)
    for packet in (b"garbage", too_large, begin(1), observe(1, 0, [1, 2]), observe(1, 1, [1, 2]), begin(2)):
        assert feed.send(packet)
    feed.shut_down()
    reports, told = socket.socketpair()
    with reports, told:
        listen(heard, told, Listener(Foreseeing("s@1")))
        first, *_ = reports.recv(1 << 16).splitlines()
    assert json.loads(first) == {"listening": True}
