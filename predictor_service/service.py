"""The face of the predictor service: decode, call the session, encode; over gRPC, or over a packet socket.

A gRPC stream has two threads, a packet connection has one, which reads everything that waits before it goes on:

    gRPC's thread   reads requests ──▶ DroppingQueue ──▶ the call's own thread: decodes, predicts, answers
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Final
from uuid import uuid4

import grpc
from google.protobuf.message import DecodeError

from predictor_service.dropping_queue import DroppingQueue
from predictor_service.feed import Feed
from predictor_service.lineup import Lineup
from predictor_service.session import Session, VersionCost
from predictor_service.session_book import OpenSession, PredictorStats, SessionBook, SessionLimits
from promoe.errors import DeadlineExceeded, InvalidInput, ModelMismatch, Unavailable, code_of
from promoe.hint_wire import (
    decode_observation,
    decode_requests_ended,
    decode_step_start,
    encode_hint,
    encode_version,
)
from promoe.model_spec import ModelSpec
from promoe.packet_channel import PacketChannel
from promoe.threaded_rpc import told
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc
from promoe.wire import SCHEMA_VERSION, check_schema, encode_spec

SERVICE_NAME: Final = "promoe.v1.Predictor"

HELLO_DEADLINE_S: Final = 10.0
"""Who connects and says nothing must not keep a place for ever."""

MOST_PACKETS_A_TURN: Final = 256
"""That are read before one is answered: who never stops sending gets answers all the same."""


class PredictorService(pb_grpc.PredictorServicer):
    """Servicer of predictions.

    Args:
        spec: the model whose experts are predicted.
        lineup: who makes the hints of steps that begin now.
        limits: what one session and all together may use.
        feed: takes what was said, after it was answered.

    Attributes:
        has_packets: `converse` is served, too.
    """

    def __init__(self, spec: ModelSpec, lineup: Callable[[], Lineup], limits: SessionLimits, feed: Feed) -> None:
        self.has_packets = False
        self._feed = feed
        self._sessions = SessionBook[pb.PredictRequest](spec, lineup, limits)
        self._info = model_pb2.ServiceInfo(
            version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=uuid4().hex
        )

    def register(self, server: grpc.Server) -> None:
        """Makes the server answer for this service."""
        pb_grpc.add_PredictorServicer_to_server(self, server)

    def end_streams(self, error: Unavailable) -> None:
        """Ends every node's stream with what ends the service."""
        self._sessions.end_all(error)

    def costs(self) -> dict[str, VersionCost]:
        """Of the versions that made hints."""
        return self._sessions.costs()

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
            active=encode_version(self._sessions.lineup().active.version),
            packets=self.has_packets,
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
        with self._opened(_await_hello(request_iterator, context)) as entry:
            yield self._welcome(entry.session)
            reader = threading.Thread(
                target=_read_events, args=(request_iterator, entry.waiting), name="read", daemon=True
            )
            reader.start()
            while (event := entry.waiting.get()) is not None:
                response = self._handle(entry.session, event)
                if response is not None:
                    yield response
                self._tell(entry.number, event, response)

    def converse(self, channel: PacketChannel) -> None:
        """The same session, a message per packet; its end is a message, too."""
        try:
            self._converse(channel)
        except Exception as error:  # noqa: BLE001 (the process edge of every connection)
            # A bug is logged there with its traceback; the other connections go on.
            status, text = told(error, f"{SERVICE_NAME}/packets")
            _send(channel, pb.PredictResponse(end=pb.SessionEnd(status_code=code_of(status), reason=text)))

    def _converse(self, channel: PacketChannel) -> None:
        hello = channel.receive(HELLO_DEADLINE_S)
        if hello is None:
            raise DeadlineExceeded(f"No hello came within {HELLO_DEADLINE_S:g} s.")
        with self._opened(_decode(hello)) as entry:
            _send(channel, self._welcome(entry.session))
            while (event := _await_event(channel, entry.waiting)) is not None:
                response = self._handle(entry.session, event)
                if response is not None and not _send(channel, response):
                    if response.HasField("welcome"):
                        # It would go on with a version that is none any more; it comes again and is told then.
                        raise Unavailable("The node does not read, and must hear of another version.")
                    entry.session.counters.unsent_hints += len(response.hints.hints)
                self._tell(entry.number, event, response)

    @contextmanager
    def _opened(self, first: pb.PredictRequest | None) -> Iterator[OpenSession[pb.PredictRequest]]:
        hello = self._check_hello(first)
        max_rows = min(hello.max_rows, self._sessions.limits.max_rows)
        with self._sessions.opened(hello.service.instance_id, max_rows) as entry:
            try:
                yield entry
            finally:
                self._feed.end(entry.number)

    def _welcome(self, session: Session) -> pb.PredictResponse:
        canary = session.announced_canary
        welcome = pb.PredictWelcome(
            service=self._info,
            active=encode_version(session.announced),
            max_rows=session.max_rows,
            canary=None if canary is None else encode_version(canary),
        )
        return pb.PredictResponse(welcome=welcome)

    def _tell(self, number: int, event: pb.PredictRequest, response: pb.PredictResponse | None) -> None:
        """When the node has its answer already; costs nothing while nobody listens."""
        if self._feed.has_listeners:
            hints = b"" if response is None else response.SerializeToString()
            self._feed.tell(number, event.SerializeToString(), hints)

    def _handle(self, session: Session, request: pb.PredictRequest) -> pb.PredictResponse | None:
        match request.WhichOneof("event"):
            case "observation":
                hints = session.observe(decode_observation(request.observation))
                if hints:
                    return pb.PredictResponse(hints=pb.Hints(hints=[encode_hint(hint) for hint in hints]))
            case "step_start":
                if session.begin_step(decode_step_start(request.step_start)) is not None:
                    return self._welcome(session)
            case "requests_ended":
                session.end_requests(decode_requests_ended(request.requests_ended).request_ids)
            case _:
                raise InvalidInput("After the hello, a node sends steps, observations and ended requests only.")
        return None

    def _check_hello(self, first: pb.PredictRequest | None) -> pb.PredictHello:
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


def _await_hello(requests: Iterator[pb.PredictRequest], context: grpc.ServicerContext) -> pb.PredictRequest | None:
    """None when the node ends the stream first; a call in which it says nothing is cancelled."""
    timer = threading.Timer(HELLO_DEADLINE_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        return next(requests, None)
    finally:
        timer.cancel()


def _read_events(requests: Iterator[pb.PredictRequest], waiting: DroppingQueue[pb.PredictRequest]) -> None:
    """Moves what comes into the queue, until the node ends the stream, breaks off or vanishes."""
    try:
        for request in requests:
            _put(waiting, request)
    except grpc.RpcError:  # the call is over
        pass
    finally:
        waiting.close()


def _await_event(channel: PacketChannel, waiting: DroppingQueue[pb.PredictRequest]) -> pb.PredictRequest | None:
    """The next one; everything that has come goes through the queue, so that what is too old is dropped."""
    try:
        data = None if waiting.is_closed else channel.receive(0 if len(waiting) else None)
        num_read = 0
        while data is not None:
            _put(waiting, _decode(data))
            num_read += 1
            data = channel.receive(0) if num_read < MOST_PACKETS_A_TURN else None
    except Unavailable:  # the node has left, or the service is shutting down
        waiting.close()
    return waiting.get()


def _put(waiting: DroppingQueue[pb.PredictRequest], request: pb.PredictRequest) -> None:
    waiting.put(request, droppable=request.WhichOneof("event") == "observation")


def _decode(data: bytes) -> pb.PredictRequest:
    try:
        return pb.PredictRequest.FromString(data)
    except DecodeError as error:
        raise InvalidInput("A packet is no message of Predict.") from error


def _send(channel: PacketChannel, response: pb.PredictResponse) -> bool:
    """False for a node that does not read, or is gone: it is told nothing, and hints would be late already."""
    try:
        return channel.send(response.SerializeToString())
    except Unavailable:
        return False
