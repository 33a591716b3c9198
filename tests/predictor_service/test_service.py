"""A node over packets that reads nothing: what has no room is counted, and another version is not kept from it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from predictor_service.feed import Feed
from predictor_service.lineup import Lineup
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.predictors.none import NonePredictor
from predictor_service.service import PredictorService
from predictor_service.session_book import SessionLimits
from promoe.hint_wire import encode_observation, encode_step_start
from promoe.model_spec import Dtype
from promoe.packet_channel import PacketChannel
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import SCHEMA_VERSION, encode_spec
from tests.predictor_service.layer_events import decode_start, make_spec, observed, source_of
from tests.running_store import wait_until

SPEC = make_spec(layers=3, experts=2048, per_token=2)
DEADLINE_S = 20.0


@dataclass
class DeafNode:
    """One end of a session whose hints nobody reads."""

    channel: PacketChannel
    service: PredictorService
    thread: threading.Thread
    step: int = 0

    def tell(self, request: pb.PredictRequest) -> None:
        self.channel.send(request.SerializeToString())

    def show_step(self) -> None:
        self.step += 1
        self.tell(pb.PredictRequest(step_start=encode_step_start(decode_start(self.step))))
        ids_RK = np.array([[1, 2]], np.uint16)
        for layer in range(SPEC.num_moe_layers):
            observation = encode_observation(observed(self.step, layer, ids_RK), Dtype.FLOAT32)
            self.tell(pb.PredictRequest(observation=observation))

    def fill(self) -> None:
        """Until the node's buffer has no room."""
        while not self.service.stats().unsent_hints:
            self.show_step()
            wait_until(lambda: self.service.stats().observations == SPEC.num_moe_layers * self.step)


@contextmanager
def deaf_node(lineups: list[Lineup]) -> Iterator[DeafNode]:
    service = PredictorService(SPEC, lambda: lineups[-1], SessionLimits(4, 2, 64), Feed())
    here, there = (PacketChannel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    node = DeafNode(here, service, threading.Thread(target=service.converse, args=(there,)))
    node.thread.start()
    info = model_pb2.ServiceInfo(version="0", schema_version=SCHEMA_VERSION, instance_id="deaf")
    node.tell(pb.PredictRequest(hello=pb.PredictHello(service=info, model=encode_spec(SPEC), max_rows=4)))
    try:
        yield node
    finally:
        here.shut_down()
        node.thread.join(DEADLINE_S)
        here.close()
        there.close()


def test_hints_without_room_are_counted() -> None:
    with deaf_node([Lineup(FrequencyPredictor(source_of(SPEC)))]) as node:
        node.fill()
        stats = node.service.stats()
        assert 0 < stats.unsent_hints <= stats.hints


def test_a_node_that_cannot_be_told_of_another_version_has_to_come_again() -> None:
    lineups = [Lineup(FrequencyPredictor(source_of(SPEC)))]
    with deaf_node(lineups) as node:
        node.fill()
        lineups.append(Lineup(NonePredictor(source_of(SPEC))))
        node.show_step()
        node.thread.join(DEADLINE_S)
        assert not node.thread.is_alive(), "or the node would go on with what is not active any more"
