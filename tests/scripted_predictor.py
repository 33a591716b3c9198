"""A predictor service that says what a test tells it to: the peer's second implementation, over real sockets."""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import sleep
from types import TracebackType
from typing import Self, TypeAlias

import grpc
from google.protobuf.message import Message

from predictor_service.packet_server import PacketServer
from promoe.errors import Unavailable
from promoe.hint import ObservedKind, PredictorVersion
from promoe.hint_wire import encode_version
from promoe.model_spec import ModelSpec
from promoe.packet_channel import PacketChannel, packet_path
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import SCHEMA_VERSION, encode_spec

VERSION = PredictorVersion("scripted@1", "scripted", ObservedKind.LAYER_INPUT, (1, 2), True, True)

Response: TypeAlias = pb.PredictResponse | bytes
Script: TypeAlias = Callable[[Iterator[pb.PredictRequest]], Iterator[Response]]
"""One stream: gets what the node sends (the hello first) and yields what it is answered; bytes go out as they are."""


def welcome(version: PredictorVersion = VERSION, max_rows: int = 8) -> pb.PredictResponse:
    """The first message of a service that behaves."""
    service = model_pb2.ServiceInfo(version="0", schema_version=SCHEMA_VERSION, instance_id="scripted")
    return pb.PredictResponse(
        welcome=pb.PredictWelcome(service=service, active=encode_version(version), max_rows=max_rows)
    )


def hints(*messages: pb.Hint) -> pb.PredictResponse:
    """One message of hints."""
    return pb.PredictResponse(hints=pb.Hints(hints=messages))


def good_hint(observation: pb.Observation, version: str = VERSION.version) -> pb.Hint:
    """For the layer after the observed one."""
    return pb.Hint(
        step=observation.step,
        layer=observation.layer + 1,
        observed_step=observation.step,
        observed_layer=observation.layer,
        experts=[3, 1, 2],
        scores=[0.9, 0.5, 0.25],
        num_expected=2,
        version=version,
    )


def one_hint_each(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    """Welcomes, then answers every observation with a hint for the layer after it, or for the next step's first."""
    num_layers = next(requests).hello.model.num_moe_layers
    yield welcome()
    for request in requests:
        if request.HasField("observation"):
            hint = good_hint(request.observation)
            if hint.layer >= num_layers:
                hint.step, hint.layer = hint.step + 1, 0
            yield hints(hint)


Serve: TypeAlias = "Callable[..., ScriptedPredictor]"
"""Makes one at an endpoint that is decided already."""


class ScriptedPredictor:
    """Serves in threads of the test's process.

    Args:
        with_packets: over a packet socket, too; then nodes of this host do not use the stream.

    Attributes:
        info: what GetInfo answers.
        script: what Predict streams.
        requests: what nodes sent over Predict.
    """

    def __init__(
        self, endpoint: str, spec: ModelSpec, script: Script = one_hint_each, with_packets: bool = False
    ) -> None:
        self.endpoint = endpoint
        self.info = pb.PredictorGetInfoResponse(
            service=model_pb2.ServiceInfo(version="0", schema_version=SCHEMA_VERSION, instance_id="scripted"),
            model=encode_spec(spec),
            active=encode_version(VERSION),
        )
        self.script = script
        self.requests: queue.SimpleQueue[pb.PredictRequest] = queue.SimpleQueue()
        self.num_sessions = 0
        self._server = grpc.server(ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
        info_handler = grpc.unary_unary_rpc_method_handler(
            lambda _request, _context: self.info,
            request_deserializer=pb.PredictorGetInfoRequest.FromString,
            response_serializer=_serialize,
        )
        predict_handler = grpc.stream_stream_rpc_method_handler(
            self._predict, request_deserializer=pb.PredictRequest.FromString, response_serializer=_serialize
        )
        handlers: dict[str, grpc.RpcMethodHandler] = {"GetInfo": info_handler, "Predict": predict_handler}  # type: ignore[type-arg]
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("promoe.v1.Predictor", handlers)])
        self._server.add_insecure_port(endpoint)
        self._packets: PacketServer | None = None
        path = packet_path(endpoint)
        if with_packets and path is not None:
            self._packets = PacketServer(path, self._converse, 8)
            self.info.packets = True

    def __enter__(self) -> Self:
        self._server.start()
        if self._packets is not None:
            self._packets.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Gone, with all its streams; nobody was told."""
        if self._packets is not None:
            self._packets.close()
            self._packets = None
        self._server.stop(0).wait(10)

    def observations(self) -> list[pb.Observation]:
        """Takes what came so far, other messages left out."""
        came: list[pb.Observation] = []
        while not self.requests.empty():
            request = self.requests.get()
            if request.HasField("observation"):
                came.append(request.observation)
        return came

    def _predict(self, requests: Iterator[pb.PredictRequest], context: grpc.ServicerContext) -> Iterator[Response]:
        self.num_sessions += 1
        yield from self.script(self._recorded(requests))

    def _converse(self, channel: PacketChannel) -> None:
        self.num_sessions += 1
        with suppress(Unavailable):  # the node is gone
            for response in self.script(self._recorded(_packets(channel))):
                while not channel.send(_serialize(response)):
                    sleep(0)  # a flood waits for the node to read

    def _recorded(self, requests: Iterator[pb.PredictRequest]) -> Iterator[pb.PredictRequest]:
        try:
            for request in requests:
                self.requests.put(request)
                yield request
        except grpc.RpcError:  # the node is gone
            return


def _packets(channel: PacketChannel) -> Iterator[pb.PredictRequest]:
    with suppress(Unavailable):  # the node is gone
        while (data := channel.receive(None)) is not None:
            yield pb.PredictRequest.FromString(data)


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()
