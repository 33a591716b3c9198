"""The gRPC face of the predictor service: decode, call the session, encode. A stream has two threads.

gRPC's thread   reads requests ──▶ DroppingQueue ──▶ the call's own thread: decodes, predicts, answers
"""

import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Final
from uuid import uuid4

import grpc

from predictor_service.dropping_queue import DroppingQueue
from predictor_service.predictor import Predictor
from predictor_service.session import Session
from predictor_service.session_book import PredictorStats, SessionBook, SessionLimits
from promoe.errors import InvalidInput, ModelMismatch, Unavailable
from promoe.hint import Hint
from promoe.hint_wire import (
    decode_observation,
    decode_requests_ended,
    decode_step_start,
    encode_hint,
    encode_version,
)
from promoe.model_spec import ModelSpec
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc
from promoe.wire import SCHEMA_VERSION, check_schema, encode_spec

SERVICE_NAME: Final = "promoe.v1.Predictor"


class PredictorService(pb_grpc.PredictorServicer):
    """Servicer of one predictor version.

    Args:
        spec: the model whose experts are predicted.
        predictor: makes all hints.
        limits: what one session and all together may use.
    """

    def __init__(self, spec: ModelSpec, predictor: Predictor, limits: SessionLimits) -> None:
        self._sessions = SessionBook[pb.PredictRequest](spec, predictor, limits)
        self._info = model_pb2.ServiceInfo(
            version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=uuid4().hex
        )

    def register(self, server: grpc.Server) -> None:
        """Makes the server answer for this service."""
        pb_grpc.add_PredictorServicer_to_server(self, server)

    def end_streams(self, error: Unavailable) -> None:
        """Ends every node's stream with what ends the service."""
        self._sessions.end_all(error)

    def stats(self) -> PredictorStats:
        """Figures of all sessions."""
        return self._sessions.stats()

    def GetInfo(
        self, request: pb.PredictorGetInfoRequest, context: grpc.ServicerContext
    ) -> pb.PredictorGetInfoResponse:
        """Answers from memory."""
        return pb.PredictorGetInfoResponse(
            service=self._info,
            model=encode_spec(self._sessions.spec),
            active=encode_version(self._sessions.predictor.version),
        )

    def Stats(self, request: pb.PredictorStatsRequest, context: grpc.ServicerContext) -> pb.PredictorStatsResponse:
        """Answers from memory."""
        stats = self._sessions.stats()
        return pb.PredictorStatsResponse(
            active=encode_version(stats.active),
            sessions=stats.sessions,
            observations=stats.observations,
            dropped_observations=stats.dropped_observations,
            refused_observations=stats.refused_observations,
            hints=stats.hints,
            predict_s=stats.predict_s,
        )

    def Predict(
        self, request_iterator: Iterator[pb.PredictRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.PredictResponse]:
        """One node's session: from its hello until either side ends the stream."""
        hello = self._read_hello(request_iterator)
        max_rows = min(hello.max_rows, self._sessions.limits.max_rows)
        with self._sessions.opened(hello.service.instance_id, max_rows) as entry:
            yield pb.PredictResponse(
                welcome=pb.PredictWelcome(
                    service=self._info, active=encode_version(self._sessions.predictor.version), max_rows=max_rows
                )
            )
            reader = threading.Thread(
                target=_read_events, args=(request_iterator, entry.waiting), name="read", daemon=True
            )
            reader.start()
            while (event := entry.waiting.get()) is not None:
                hints = _handle(entry.session, event)
                if hints:
                    yield pb.PredictResponse(hints=pb.Hints(hints=[encode_hint(hint) for hint in hints]))

    def _read_hello(self, requests: Iterator[pb.PredictRequest]) -> pb.PredictHello:
        first = next(requests, None)
        if first is None or first.WhichOneof("event") != "hello":
            raise InvalidInput("The first message of Predict must be a hello.")
        hello = first.hello
        check_schema(hello.service, "the compute node")
        spec = self._sessions.spec
        if hello.model.fingerprint != spec.fingerprint:
            raise ModelMismatch(
                f"The compute node serves {hello.model.name or 'a model'} with fingerprint "
                f"{hello.model.fingerprint or 'unknown'}; this predictor is for {spec.name} with fingerprint "
                f"{spec.fingerprint}."
            )
        if hello.max_rows == 0:
            raise InvalidInput("The hello's max_rows is 0; expected the most rows an observation will have.")
        return hello


def _read_events(requests: Iterator[pb.PredictRequest], waiting: DroppingQueue[pb.PredictRequest]) -> None:
    """Moves what comes into the queue, until the node ends the stream, breaks off or vanishes."""
    try:
        for request in requests:
            waiting.put(request, droppable=request.WhichOneof("event") == "observation")
    except grpc.RpcError:  # the call is over
        pass
    finally:
        waiting.close()


def _handle(session: Session, request: pb.PredictRequest) -> Sequence[Hint]:
    match request.WhichOneof("event"):
        case "observation":
            return session.observe(decode_observation(request.observation))
        case "step_start":
            session.begin_step(decode_step_start(request.step_start))
        case "requests_ended":
            session.end_requests(decode_requests_ended(request.requests_ended).request_ids)
        case _:
            raise InvalidInput("After the hello, a node sends steps, observations and ended requests only.")
    return ()
