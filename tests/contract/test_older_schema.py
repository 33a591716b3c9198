"""Peers one minor apart work together, both ways: an older service or node is played with the recorded 1.0 schema.

Its message classes come from what was released, so that it cannot know what was added since.
"""

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from compute_node.hint_client import PredictorState
from promoe.errors import ModelMismatch, PromoeError
from promoe.model_spec import ModelSpec
from promoe.predictor_admin import PredictorAdmin
from promoe.rpc import domain_error
from promoe.schema import OUR_SCHEMA
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import encode_spec
from tests.contract.hint_node import NUM_LAYERS, SPEC, node_at, warnings_in
from tests.packs import write_synthetic_pack
from tests.promoe.released_schema import ReleasedSchema
from tests.running_predictor import RunningPredictor
from tests.scripted_predictor import ScriptedPredictor, one_hint_each

OLDER = ReleasedSchema("1.0")
NEWER = f"{OUR_SCHEMA.major}.{OUR_SCHEMA.minor + 1}"


def unknown_fields(message: Message) -> list[int]:
    """Numbers that the message's schema does not know, at its top."""
    fields = UnknownFieldSet(message)
    return [fields[index].field_number for index in range(len(fields))]


def service_info(version: str = OLDER.version) -> dict[str, str]:
    return {"version": "0.0.9", "schema_version": version, "instance_id": "older"}


class OlderService:
    """A predictor of 1.0 over a real socket: gRPC only, one version for ever, every layer observed.

    Attributes:
        requests: what came, as 1.0 reads it.
    """

    def __init__(self, endpoint: str, spec: ModelSpec) -> None:
        self.requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._model = OLDER.message("ModelSpec").FromString(encode_spec(spec).SerializeToString())
        self._server = grpc.server(ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
        handlers: dict[str, grpc.RpcMethodHandler[Message, Message]] = {
            "GetInfo": grpc.unary_unary_rpc_method_handler(
                self._get_info,
                request_deserializer=OLDER.message("PredictorGetInfoRequest").FromString,
                response_serializer=lambda message: message.SerializeToString(),
            ),
            "Predict": grpc.stream_stream_rpc_method_handler(
                self._predict,
                request_deserializer=OLDER.message("PredictRequest").FromString,
                response_serializer=lambda message: message.SerializeToString(),
            ),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("promoe.v1.Predictor", handlers)])
        self._server.add_insecure_port(endpoint)

    @contextmanager
    def serving(self) -> Iterator["OlderService"]:
        self._server.start()
        try:
            yield self
        finally:
            self._server.stop(0).wait(10)

    def take(self, kind: str) -> list[Message]:
        """What came so far of one kind."""
        came: list[Message] = []
        while not self.requests.empty():
            request = self.requests.get()
            if request.WhichOneof("event") == kind:
                came.append(getattr(request, kind))
        return came

    def _get_info(self, _request: Message, _context: grpc.ServicerContext) -> Message:
        return OLDER.message("PredictorGetInfoResponse")(
            service=service_info(), model=self._model, active=self._version
        )

    @property
    def _version(self) -> dict[str, object]:
        return {
            "version": "older@1",
            "predictor": "older",
            "observed": "OBSERVED_KIND_LAYER_INPUT",
            "lookaheads": [1],
            "calibrated": True,
            "wants_routing": True,
        }

    def _predict(self, requests: Iterator[Message], _context: grpc.ServicerContext) -> Iterator[Message]:
        response = OLDER.message("PredictResponse")
        next(requests)
        yield response(welcome={"service": service_info(), "active": self._version, "max_rows": 4})
        for request in requests:
            self.requests.put(request)
            observation = getattr(request, "observation")  # noqa: B009 (classes made at run time)
            if request.HasField("observation") and observation.layer < NUM_LAYERS - 1:
                hint = {
                    "step": observation.step,
                    "layer": observation.layer + 1,
                    "observed_step": observation.step,
                    "observed_layer": observation.layer,
                    "experts": [1, 2],
                    "scores": [0.75, 0.5],
                    "num_expected": 2,
                    "version": "older@1",
                }
                yield response(hints={"hints": [hint]})


@pytest.fixture
def endpoint(socket_dir: Path) -> str:
    return f"unix:{socket_dir / 'predictor.sock'}"


def test_an_older_service_works_with_this_node(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with OlderService(endpoint, SPEC).serving() as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        node.run_until(lambda: len(node.received) > 10)
        active = node.client.active
        assert active is not None
        assert (active.version, active.observe_every) == ("older@1", 1), "every layer, as 1.0 always did"
        events = [service.requests.get() for _ in range(service.requests.qsize())]
        starts = [event for event in events if event.WhichOneof("event") == "step_start"]
        assert starts
        for event in events:
            kind = event.WhichOneof("event")
            assert kind is not None, "nothing is sent that it does not know"
            assert unknown_fields(getattr(event, kind)) == [], kind
        assert node.client.traffic.invalid == 0
    assert warnings_in(caplog) == []


def test_a_newer_service_works_with_this_node(endpoint: str) -> None:
    def newer(requests: Iterator[pb.PredictRequest]) -> Iterator[bytes]:
        for response in one_hint_each(requests):
            assert not isinstance(response, bytes)
            if response.HasField("welcome"):
                response.welcome.service.schema_version = NEWER
            # A field that only the next schema knows: number 1000, a varint.
            yield response.SerializeToString() + b"\xc0\x3e\x01"

    service = ScriptedPredictor(endpoint, SPEC, newer)
    service.info.service.schema_version = NEWER
    with service, node_at(endpoint) as node:
        node.run_until(lambda: len(node.received) > 10)


class OlderNode:
    """A node of 1.0: takes a welcome as it comes, names no versions."""

    def __init__(self, endpoint: str, schema_version: str = OLDER.version) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        predict: grpc.StreamStreamMultiCallable[Message, Message] = self._channel.stream_stream(
            "/promoe.v1.Predictor/Predict",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=OLDER.message("PredictResponse").FromString,
        )
        get_info: grpc.UnaryUnaryMultiCallable[Message, Message] = self._channel.unary_unary(
            "/promoe.v1.Predictor/GetInfo",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=OLDER.message("PredictorGetInfoResponse").FromString,
        )
        info = get_info(OLDER.message("PredictorGetInfoRequest")(), timeout=10)
        self.model = info.model  # type: ignore[attr-defined]
        self._responses = predict(iter(self._requests.get, None))
        self.send(hello={"service": service_info(schema_version), "model": self.model, "max_rows": 4})

    def send(self, **event: object) -> None:
        self._requests.put(OLDER.message("PredictRequest")(**event))

    def receive(self) -> Message:
        try:
            return next(self._responses)
        except grpc.RpcError as error:
            raise domain_error(error) from error

    def run_step(self, step: int) -> tuple[set[str], str]:
        """The versions of a step's hints, and of a welcome that came with it."""
        span = {"request_id": "r", "num_tokens": 1, "phase": "STEP_PHASE_DECODE"}
        self.send(step_start={"step": step, "spans": [span]})
        topk_ids = bytes(2 * self.model.experts_per_token) if self.model.experts_per_token < 2 else b"\0\0\1\0"
        for layer in range(self.model.num_moe_layers):
            routing = {"layer": layer, "topk_ids": topk_ids}
            self.send(observation={"step": step, "layer": layer, "rows": [0], "num_tokens": 1, "routings": [routing]})
        names: set[str] = set()
        announced = ""
        num_answers = 0
        while num_answers < self.model.num_moe_layers:
            response = self.receive()
            if response.HasField("welcome"):
                announced = response.welcome.active.version  # type: ignore[attr-defined]
            else:
                num_answers += 1
                names |= {hint.version for hint in response.hints.hints}  # type: ignore[attr-defined]
        return names, announced

    def close(self) -> None:
        self._requests.put(None)
        self._channel.close()


@pytest.fixture(scope="module")
def service(module_socket_dir: Path) -> Iterator[RunningPredictor]:
    write_synthetic_pack(module_socket_dir / "pack", layers=5)
    registry = f"predictor.registry={module_socket_dir / 'registry'}"
    with RunningPredictor(module_socket_dir / "pack", module_socket_dir, registry) as running:
        running.wait_until_serving()
        yield running
        assert "Traceback" not in running.log.read_text()


def test_an_older_node_works_with_this_service_through_a_change_of_versions(service: RunningPredictor) -> None:
    node = OlderNode(service.endpoint)
    try:
        welcome = node.receive()
        assert welcome.welcome.active.version == "transition@1"  # type: ignore[attr-defined]
        assert node.run_step(1) == ({"transition@1"}, "")
        PredictorAdmin(service.endpoint).activate("frequency", "ann", "")
        names, announced = node.run_step(2)
        assert (names, announced) == ({"transition@1"}, "frequency@1")
        assert node.run_step(3) == ({"frequency@1"}, "")
    finally:
        node.close()


@pytest.mark.parametrize(("theirs", "is_served"), [(NEWER, True), ("1.9", False), ("2.1", False), ("", False)])
def test_who_is_further_apart_is_refused_with_both_sides(
    service: RunningPredictor, theirs: str, is_served: bool
) -> None:
    node = OlderNode(service.endpoint, theirs)
    try:
        if is_served:
            assert node.receive().HasField("welcome")
            return
        with pytest.raises(PromoeError) as refused:
            node.receive()
        assert isinstance(refused.value, ModelMismatch)
        for side in (f"schema {theirs or 'unknown'} (promoe 0.0.9)", f"speaks {OUR_SCHEMA} (promoe "):
            assert side in str(refused.value)
    finally:
        node.close()
