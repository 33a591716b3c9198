"""The predictor service's contract: a real server process, and nodes that keep to it or do not."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from promoe.errors import InvalidInput, ModelMismatch, Overloaded, PromoeError
from promoe.hint import Observation, RequestsEnded, StepSpan
from promoe.hint_wire import decode_hint, decode_version, encode_requests_ended
from promoe.pack_manifest import PackManifest
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import SCHEMA_VERSION, encode_spec
from tests.packs import write_synthetic_pack
from tests.running_predictor import PredictStream, RunningPredictor, one_token
from tests.running_store import wait_until

NUM_LAYERS = 5
OPTIONS = ("predictor.predictor=frequency", "predictor.max_sessions=3", "predictor.max_rows=4")


@pytest.fixture(scope="module")
def pack(module_socket_dir: Path) -> Path:
    write_synthetic_pack(module_socket_dir / "pack", layers=NUM_LAYERS)
    return module_socket_dir / "pack"


@pytest.fixture(scope="module")
def manifest(pack: Path) -> PackManifest:
    return PackManifest.read(pack)


@pytest.fixture(scope="module", params=["grpc", "packets"])
def service(pack: Path, module_socket_dir: Path, request: pytest.FixtureRequest) -> Iterator[RunningPredictor]:
    """One service for the module, talked to one way or the other; nothing that a node does may leave a traceback."""
    with RunningPredictor(pack, module_socket_dir, *OPTIONS, packets=request.param == "packets") as running:
        running.wait_until_serving()
        yield running
        wait_until(lambda: running.stats().sessions == 0, log=running.log)
        assert running.process.poll() is None, running.log.read_text()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


def serve_layers(node: PredictStream, step: int) -> list[pb.Hint]:
    """One decode step as a node tells it; a hint comes back for each layer."""
    node.begin_step(step)
    hints: list[pb.Hint] = []
    for layer in range(NUM_LAYERS):
        node.observe(one_token(step, layer, [layer % 4, 3 - layer % 4]))
        hints += node.receive().hints.hints
    return hints


def test_a_node_is_welcomed_and_gets_hints(service: RunningPredictor, manifest: PackManifest) -> None:
    info = service.get_info()
    assert info.model == encode_spec(manifest.spec)
    assert info.service.schema_version == SCHEMA_VERSION
    before = service.stats()
    with service.node(max_rows=8) as node:
        assert node.welcome.active == info.active
        assert node.welcome.max_rows == 4, "the lesser of both"
        version = decode_version(node.welcome.active)
        assert (version.version, version.predictor) == ("frequency@1", "frequency")
        hints = [decode_hint(hint) for step in (1, 2) for hint in serve_layers(node, step)]
        node.finish()
        with pytest.raises(StopIteration):
            node.receive()
    assert [(hint.step, hint.layer) for hint in hints[:5]] == [(1, 4), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert [(hint.observed_step, hint.observed_layer) for hint in hints[:5]] == [(1, layer) for layer in range(5)]
    assert all(hint.version == version.version and hint.num_expected == 2 for hint in hints)
    second_of_layer_0 = next(hint for hint in hints if (hint.step, hint.layer) == (3, 0))
    assert set(second_of_layer_0.experts[:2].tolist()) == {0, 3}, "what was routed there before"
    after = service.stats()
    assert (after.observations - before.observations, after.hints - before.hints) == (10, 10)
    assert after.predict_s > before.predict_s


def test_health_says_serving(service: RunningPredictor) -> None:
    with grpc.insecure_channel(service.endpoint) as channel:
        for name in ("", "promoe.v1.Predictor"):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def refused(service: RunningPredictor, *requests: pb.PredictRequest) -> PromoeError:
    """What the service ends a stream of these requests with."""
    with service.open_stream() as stream:
        for request in requests:
            stream.send(request)
        try:
            while True:
                stream.receive()
        except PromoeError as error:
            return error


def hello_of(spec: model_pb2.ModelSpec, schema: str = SCHEMA_VERSION, max_rows: int = 8) -> pb.PredictRequest:
    service = model_pb2.ServiceInfo(version="0", schema_version=schema, instance_id="n")
    return pb.PredictRequest(hello=pb.PredictHello(service=service, model=spec, max_rows=max_rows))


def test_a_node_with_another_model_is_refused_with_both_sides(
    service: RunningPredictor, manifest: PackManifest
) -> None:
    error = refused(service, hello_of(model_pb2.ModelSpec(name="other", fingerprint="feedface")))
    assert isinstance(error, ModelMismatch)
    assert "feedface" in str(error)
    assert manifest.spec.fingerprint in str(error)


def test_a_node_of_another_schema_is_refused_with_both_sides(service: RunningPredictor, manifest: PackManifest) -> None:
    error = refused(service, hello_of(encode_spec(manifest.spec), schema="9.0"))
    assert isinstance(error, ModelMismatch)
    assert "9.0" in str(error)
    assert SCHEMA_VERSION in str(error)


def test_a_stream_begins_with_a_hello(service: RunningPredictor, manifest: PackManifest) -> None:
    assert "must be a hello" in str(refused(service, pb.PredictRequest(step_start=pb.StepStart(step=1))))
    assert "max_rows is 0" in str(refused(service, hello_of(encode_spec(manifest.spec), max_rows=0)))


START = pb.PredictRequest(
    step_start=pb.StepStart(step=1, spans=[pb.StepSpan(request_id="r", num_tokens=1, phase=pb.STEP_PHASE_DECODE)])
)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (hello_of(model_pb2.ModelSpec()), "sends steps, observations and ended requests only"),
        (START, "Step 1 came after step 1"),
        (pb.PredictRequest(step_start=pb.StepStart(step=2, spans=[pb.StepSpan(num_tokens=1)])), "phase"),
        (pb.PredictRequest(observation=pb.Observation(step=1, layer=6, num_tokens=1)), "MoE layer 6"),
        (pb.PredictRequest(observation=pb.Observation(step=1, rows=range(5), num_tokens=9)), "allowed: 4 rows"),
        (pb.PredictRequest(observation=pb.Observation(step=1, rows=[7], num_tokens=2)), "each a token of the step"),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1, rows=[0], num_tokens=1, routings=[pb.LayerRouting(layer=0, topk_ids=b"\1")]
                )
            ),
            "16-bit numbers",
        ),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1, rows=[0], num_tokens=1, routings=[pb.LayerRouting(layer=0, topk_ids=b"\1\0\xff\0")]
                )
            ),
            "experts up to 255",
        ),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1, rows=[0], num_tokens=1, routings=[pb.LayerRouting(layer=5, topk_ids=b"\1\0\2\0")]
                )
            ),
            "MoE layer 5",
        ),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1, rows=[0], num_tokens=1, routings=[pb.LayerRouting(layer=0, topk_ids=b"\1\0")]
                )
            ),
            "expected (1, 2)",
        ),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1,
                    rows=[0],
                    num_tokens=1,
                    hidden=pb.Tensor(dtype=model_pb2.DTYPE_FLOAT32, shape=[1, 2], data=bytes(8)),
                )
            ),
            "expected (1, 32)",
        ),
        (
            pb.PredictRequest(
                observation=pb.Observation(
                    step=1, rows=[0], num_tokens=1, hidden=pb.Tensor(dtype=model_pb2.DTYPE_FLOAT32, shape=[1, 32])
                )
            ),
            "0 bytes",
        ),
    ],
)
def test_garbage_ends_its_own_session_with_a_sentence(
    service: RunningPredictor, manifest: PackManifest, request_: pb.PredictRequest, words: str
) -> None:
    with service.node() as bystander:
        error = refused(service, hello_of(encode_spec(manifest.spec)), START, request_)
        assert isinstance(error, InvalidInput)
        assert words in str(error)
        assert len(serve_layers(bystander, 1)) == NUM_LAYERS


def test_an_observation_of_another_step_or_of_no_numbers_is_counted_and_passed_over(service: RunningPredictor) -> None:
    before = service.stats().refused_observations
    with service.node() as node:
        node.begin_step(5)
        node.observe(one_token(4, 0, [0, 1]))
        node.observe(Observation(5, 0, (0,), 1, np.full((1, 32), np.nan, np.float32)))
        node.observe(one_token(5, 1, [0, 1]))
        (hint,) = node.receive().hints.hints
        assert (hint.observed_step, hint.observed_layer) == (5, 1)
    assert service.stats().refused_observations == before + 2


def test_two_nodes_at_once_learn_from_their_own_past_only(service: RunningPredictor) -> None:
    with service.node("a") as first, service.node("b") as second:
        assert service.stats().sessions == 2
        for step in range(1, 20):
            serve_layers(first, step)
        hint = serve_layers(second, 1)[0]
        assert (hint.step, hint.layer) == (1, 4)
        assert set(hint.scores) == {0.5}, "nothing learned, and uniform"


def test_more_nodes_than_allowed_are_told_so(service: RunningPredictor, manifest: PackManifest) -> None:
    with service.node("a"), service.node("b"), service.node("c"):
        error = refused(service, hello_of(encode_spec(manifest.spec)))
    assert isinstance(error, Overloaded)
    assert "serves 3 compute nodes" in str(error)
    wait_until(lambda: service.stats().sessions == 0)
    with service.node() as node:
        assert serve_layers(node, 1)


def test_a_vanishing_node_frees_its_session(service: RunningPredictor) -> None:
    with service.node() as node:
        serve_layers(node, 1)
        assert service.stats().sessions == 1
    wait_until(lambda: service.stats().sessions == 0)


def test_ended_requests_and_prefills_make_no_hints(service: RunningPredictor) -> None:
    with service.node() as node:
        node.begin_step(1, StepSpan("r", 3, is_prefill=True))
        node.observe(one_token(1, 0, [0, 1]))
        node.send(pb.PredictRequest(requests_ended=encode_requests_ended(RequestsEnded(("r",)))))
        hints = serve_layers(node, 2)
        assert hints[0].observed_step == 2
