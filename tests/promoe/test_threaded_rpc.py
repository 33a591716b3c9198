"""The threaded server keeps to the same table, health and sockets as the aio one."""

import logging
import queue
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from promoe.errors import (
    STATUS_OF_ERROR,
    AlreadyRunning,
    InternalError,
    InvalidInput,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.rpc import domain_error
from promoe.threaded_rpc import ThreadedRpcServer
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc

NAME = pb.DESCRIPTOR.services_by_name["Predictor"].full_name


class ScriptedPredictor(pb_grpc.PredictorServicer):
    """Fails as it is told; its stream answers each step with a welcome, and step 0 with the failure."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def GetInfo(
        self, request: pb.PredictorGetInfoRequest, context: grpc.ServicerContext
    ) -> pb.PredictorGetInfoResponse:
        if self.failure is not None:
            raise self.failure
        return pb.PredictorGetInfoResponse(active=pb.PredictorVersion(version="x@1"))

    def Stats(self, request: pb.PredictorStatsRequest, context: grpc.ServicerContext) -> pb.PredictorStatsResponse:
        return pb.PredictorStatsResponse()

    def Predict(
        self, request_iterator: Iterator[pb.PredictRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictResponse]:
        try:
            for request in request_iterator:
                if request.step_start.step == 0 and self.failure is not None:
                    raise self.failure
                yield pb.PredictResponse(welcome=pb.PredictWelcome(max_rows=request.step_start.step))
        finally:
            self.ended.put("ended")


@pytest.fixture
def predictor() -> ScriptedPredictor:
    return ScriptedPredictor()


@pytest.fixture
def endpoint(predictor: ScriptedPredictor, socket_dir: Path) -> Iterator[str]:
    server = ThreadedRpcServer((NAME,), max_streams=2)
    pb_grpc.add_PredictorServicer_to_server(predictor, server.server)
    endpoint = server.listen(f"unix:{socket_dir / 'p.sock'}")
    server.start()
    server.set_serving(True)
    yield endpoint
    server.stop(0)


@pytest.fixture
def channel(endpoint: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(endpoint) as channel:
        yield channel


def unary_error(channel: grpc.Channel) -> PromoeError:
    with pytest.raises(grpc.RpcError) as caught:
        pb_grpc.PredictorStub(channel).GetInfo(pb.PredictorGetInfoRequest(), timeout=5)
    return domain_error(caught.value)


def stream_error(channel: grpc.Channel) -> PromoeError:
    call = pb_grpc.PredictorStub(channel).Predict(iter([pb.PredictRequest()]), timeout=5)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return domain_error(caught.value)


@pytest.mark.parametrize("error_type", [error_type for error_type, _ in STATUS_OF_ERROR])
def test_a_domain_error_arrives_as_itself(
    error_type: type[PromoeError], predictor: ScriptedPredictor, channel: grpc.Channel
) -> None:
    predictor.failure = error_type("What went wrong: ä ✗.")
    for error in (unary_error(channel), stream_error(channel)):
        assert type(error) is error_type
        assert str(error) == "What went wrong: ä ✗."


def test_an_overload_says_when_to_come_again(predictor: ScriptedPredictor, channel: grpc.Channel) -> None:
    predictor.failure = Overloaded("Full.", retry_after_ms=250)
    for error in (unary_error(channel), stream_error(channel)):
        assert isinstance(error, Overloaded)
        assert error.retry_after_ms == 250


def test_a_value_error_is_bad_input(predictor: ScriptedPredictor, channel: grpc.Channel) -> None:
    predictor.failure = ValueError("rows is -1")
    assert isinstance(unary_error(channel), InvalidInput)
    assert isinstance(stream_error(channel), InvalidInput)


def test_a_bug_is_logged_and_told_without_its_internals(
    predictor: ScriptedPredictor, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    predictor.failure = KeyError("secret")
    with caplog.at_level(logging.ERROR):
        for error in (unary_error(channel), stream_error(channel)):
            assert isinstance(error, InternalError)
            assert "secret" not in str(error)
    assert [record.name for record in caplog.records] == ["promoe.threaded_rpc"] * 2
    assert all(record.exc_info for record in caplog.records)


def test_a_caller_that_leaves_ends_its_stream_and_nothing_is_logged(
    predictor: ScriptedPredictor, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    requests: queue.SimpleQueue[pb.PredictRequest | None] = queue.SimpleQueue()
    requests.put(pb.PredictRequest(step_start=pb.StepStart(step=3)))
    call = pb_grpc.PredictorStub(channel).Predict(iter(requests.get, None))
    assert next(call).welcome.max_rows == 3
    call.cancel()
    requests.put(None)
    assert predictor.ended.get(timeout=10) == "ended"
    assert caplog.records == []


def test_health_is_served(channel: grpc.Channel) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_address_is_served_once(endpoint: str) -> None:
    with pytest.raises(AlreadyRunning, match="Another process serves"):
        ThreadedRpcServer((NAME,), 1).listen(endpoint)
    server = ThreadedRpcServer((NAME,), 1)
    taken = server.listen("127.0.0.1:0")
    assert int(taken.rpartition(":")[2]) > 0
    with pytest.raises(AlreadyRunning, match=f"Cannot listen on {taken}"):
        ThreadedRpcServer((NAME,), 1).listen(taken)
    server.start()
    server.stop(0)


def test_stopping_frees_the_socket_and_ends_what_runs(predictor: ScriptedPredictor, socket_dir: Path) -> None:
    for _ in range(2):
        server = ThreadedRpcServer((NAME,), 1)
        pb_grpc.add_PredictorServicer_to_server(predictor, server.server)
        endpoint = server.listen(f"unix:{socket_dir / 'again.sock'}")
        server.start()
        with grpc.insecure_channel(endpoint) as channel:
            requests: queue.SimpleQueue[pb.PredictRequest | None] = queue.SimpleQueue()
            requests.put(pb.PredictRequest(step_start=pb.StepStart(step=1)))
            call = pb_grpc.PredictorStub(channel).Predict(iter(requests.get, None))
            next(call)
            server.stop(0.05)
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert isinstance(domain_error(caught.value), Unavailable)
            requests.put(None)
