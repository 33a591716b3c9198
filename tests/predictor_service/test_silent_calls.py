"""Calls of nodes that say nothing: their places become free."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from predictor_service import service
from predictor_service.feed import Feed
from predictor_service.lineup import Lineup
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.service import SERVICE_NAME, PredictorService
from predictor_service.session_book import SessionLimits
from promoe.threaded_rpc import ThreadedRpcServer
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc
from tests.predictor_service.layer_events import make_spec, source_of


@pytest.fixture
def endpoint(socket_dir: Path) -> Iterator[str]:
    spec = make_spec()
    lineup = Lineup(FrequencyPredictor(source_of(spec)))
    server = ThreadedRpcServer((SERVICE_NAME,), 1)
    PredictorService(spec, lambda: lineup, SessionLimits(4, 1, 8), Feed()).register(server.server)
    endpoint = server.listen(f"unix:{socket_dir / 'predictor.sock'}")
    server.start()
    yield endpoint
    server.stop(0.0)


def test_calls_that_say_nothing_do_not_keep_their_threads(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HELLO_DEADLINE_S", 0.2)
    speaks = threading.Event()

    def silence() -> Iterator[pb.PredictRequest]:
        speaks.wait()
        yield from ()

    with grpc.insecure_channel(endpoint) as channel:
        stub = pb_grpc.PredictorStub(channel)
        # More than there are threads.
        calls = [stub.Predict(silence()) for _ in range(8)]
        assert stub.GetInfo(pb.PredictorGetInfoRequest(), timeout=30).active.version == "frequency@1"
        for call in calls:
            with pytest.raises(grpc.RpcError) as told:
                next(call)
            assert told.value.code() is grpc.StatusCode.CANCELLED
        speaks.set()
