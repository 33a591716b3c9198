"""The predictor's best-effort client: observations go out, hints come in; late or dead means "no hint", counted.

Nothing here makes the engine thread wait or fail. A session is held in one of two ways, with the same messages:

    over a packet socket, where the service is on this host
    engine thread ── StepStart, LayerSample ─► PacketCarrier ─► the service
    engine thread ◄──── HintInbox ◄──── PacketCarrier, when the expert cache looks around ◄──── the service

    over gRPC, elsewhere
    engine thread ── StepStart, LayerSample ─► OutgoingQueue ─► gRPC's sending thread: waits for the copy, encodes
    engine thread ◄──── HintInbox ◄──── this client's thread: decodes, checks, puts ◄──── gRPC
"""

import logging
import random
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Final
from uuid import uuid4

import grpc

from compute_node.connection_log import ConnectionLog
from compute_node.conversation_client import Conversation, encode_event, hello_message
from compute_node.hint_inbox import HintTaker
from compute_node.hint_session import MAX_ROWS, HintSession, HintTraffic
from compute_node.layer_sample import LayerSample, WantedSamples
from compute_node.miss_watch import MissLevel
from compute_node.outgoing import OutgoingQueue
from compute_node.packet_carrier import PacketCarrier
from promoe.errors import DeadlineExceeded, ModelMismatch, PromoeError, Unavailable
from promoe.hint import ObservedKind, PredictorVersion, RequestsEnded, StepStart
from promoe.model_spec import ModelSpec
from promoe.packet_channel import LARGEST_PACKET_NBYTES, PacketChannel, packet_path
from promoe.rpc import CHANNEL_OPTIONS, INFO_DEADLINE_S, domain_error
from promoe.schema import NAMED_STEPS
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.v1 import predictor_pb2_grpc as pb_grpc
from promoe.wire import SCHEMA_VERSION, check_schema

logger = logging.getLogger(__name__)

_MAX_RESPONSE_NBYTES: Final = 1 << 20

_CHANNEL_OPTIONS: Final = (
    *(option for option in CHANNEL_OPTIONS if option[0] != "grpc.max_receive_message_length"),
    ("grpc.max_receive_message_length", _MAX_RESPONSE_NBYTES),
    # A channel that is made anew for each try must not inherit the back-off of the one before it.
    ("grpc.use_local_subchannel_pool", 1),
)

# Bytes in and out: what cannot be decoded is the peer's fault and ours to count, not gRPC's to log.
_PREDICT: Final = "/promoe.v1.Predictor/Predict"


class PredictorState(Enum):
    """`away`: not reached at the moment, the cache reacts only."""

    CONNECTED = "connected"
    AWAY = "away"


@dataclass(frozen=True)
class Patience:
    """How long a predictor is waited for, in the background.

    Attributes:
        first_retry_s: until it is looked for again; then twice as long each time,
        last_retry_s: up to this. One that misbehaved or is another model's is left alone so long at once.
        welcome_s: until it must have answered the hello.
        settled_s: a session that lasts so long ends what was wrong before it.
        silence_s: a service on this host that neither reads nor says anything for so long is given up; gRPC's
            keepalive does the same elsewhere.
    """

    first_retry_s: float = 0.1
    last_retry_s: float = 5.0
    welcome_s: float = 5.0
    settled_s: float = 5.0
    silence_s: float = 15.0


class HintClient:
    """One node's connection to its predictor; a sampler of layers.

    Args:
        endpoint: `unix:PATH` or `host:port`.
        spec: the served model.
        hints: takes those that passed the checks.
        patience: how long it waits, and for what.
        misses: how much there is to save: while many experts are missed every layer is shown, also to a version that
            is content with fewer; while hardly any is, nothing.
        noted: called on this client's thread when the predictor has come or gone.

    Attributes:
        log: says so.
        num_failures: how often there was no session, or none any more.
        trouble: why, the last time.
    """

    def __init__(
        self,
        endpoint: str,
        spec: ModelSpec,
        hints: HintTaker,
        patience: Patience | None = None,
        misses: Callable[[], MissLevel] = lambda: MissLevel.FEW,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        self.endpoint = endpoint
        self.num_failures = 0
        self.trouble: PromoeError | None = None
        self._spec = spec
        self._hints = hints
        self._patience = patience or Patience()
        self._misses = misses
        self._noted = noted
        self._noted_session: HintSession | None = None
        self._retry_s = self._patience.first_retry_s
        self._peer = f"The predictor at {endpoint}"
        # An observation fits a packet, with room for its routing.
        self._packet_rows = max(1, min(MAX_ROWS, LARGEST_PACKET_NBYTES // 2 // (4 * spec.hidden_size)))
        self._info = model_pb2.ServiceInfo(
            version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=uuid4().hex
        )
        self.log = ConnectionLog(endpoint, self._info.instance_id)
        self._session: HintSession | None = None
        self._sampling: HintSession | None = None
        self._is_shown_nothing = False
        self._past = HintTraffic()
        self._closing = threading.Event()
        self._call: grpc.Call | None = None
        self._channel: PacketChannel | None = None
        self._carrier: PacketCarrier | None = None
        self._thread = threading.Thread(target=self._run, name="hint-client", daemon=True)

    @property
    def state(self) -> PredictorState:
        """Connected once the service has said what it wants."""
        return PredictorState.AWAY if self.active is None else PredictorState.CONNECTED

    @property
    def active(self) -> PredictorVersion | None:
        """Whose hints are taken; None while not connected."""
        session = self._session
        return None if session is None else session.active

    @property
    def traffic(self) -> HintTraffic:
        """Counters since the start."""
        past, session = self._past, self._session
        return past if session is None else session.add_to(past)

    def start(self) -> None:
        """Starts looking for the predictor; does not wait for it."""
        self._thread.start()

    def close(self) -> None:
        """Ends the session; closing twice is allowed."""
        self._closing.set()
        call, channel = self._call, self._channel
        if call is not None:
            call.cancel()
        if channel is not None:
            channel.shut_down()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the engine's thread ----

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        """See LayerSampler: what the active version wants of this step."""
        self._look()
        self._is_shown_nothing = False
        session = self._sampling = self._session
        active = None if session is None else session.active
        if session is None or active is None:
            return None
        if start.ended_request_ids:
            session.outgoing.send(RequestsEnded(start.ended_request_ids))
        misses = self._misses()
        if misses is MissLevel.HARDLY_ANY:
            self._sampling, self._is_shown_nothing = None, True
            return None
        wanted = WantedSamples(
            max_rows=session.max_rows,
            layer_input=active.observed is ObservedKind.LAYER_INPUT,
            router_input=active.observed is ObservedKind.ROUTER_INPUT,
            routing=active.wants_routing,
            every=1 if misses is MissLevel.MANY else active.observe_every,
            ready=active.wants_ready,
        )
        session.outgoing.send(replace(start, version=active.version if session.schema >= NAMED_STEPS else ""))
        return wanted

    def take(self, sample: LayerSample) -> None:
        """See LayerSampler."""
        session = self._sampling
        if session is not None:
            session.note_time(sample.step, sample.layer)
            session.outgoing.send(sample)

    def look(self) -> None:
        """A carrier without a thread of its own takes what came; of a step that shows nothing nothing is expected."""
        if not self._is_shown_nothing:
            self._look()

    def _look(self) -> None:
        carrier = self._carrier
        if carrier is not None:
            carrier.look()

    def flush(self) -> None:
        """The same for what was still on its way to the host when it was handed over."""
        carrier = self._carrier
        if carrier is not None:
            carrier.flush()

    # ---- gRPC's sending thread ----

    def _requests(self, outgoing: OutgoingQueue) -> Iterator[bytes]:
        """The stream's messages, until the session's end."""
        yield hello_message(self._info, self._spec, MAX_ROWS)
        while (event := outgoing.next_event()) is not None:
            yield encode_event(event)
            outgoing.num_sent += isinstance(event, LayerSample)

    # ---- this client's thread ----

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._hold_session()
                error: PromoeError = Unavailable("The predictor ended the session.")
            except PromoeError as failure:
                error = failure
            if self._closing.is_set():
                return
            self.log.away(error)
            self.trouble = error
            self.num_failures += 1
            self._noted()
            # Nodes that lost the same service must not come back together.
            self._closing.wait(self._delay_after(error) * random.uniform(0.75, 1.25))

    def _delay_after(self, error: PromoeError) -> float:
        if not isinstance(error, Unavailable | DeadlineExceeded):
            return self._patience.last_retry_s
        delay_s = self._retry_s
        self._retry_s = min(2 * delay_s, self._patience.last_retry_s)
        return delay_s

    def _hold_session(self) -> None:
        """One connection, from the handshake until it breaks.

        Raises:
            PromoeError: why there is none (any more).
        """
        try:
            with grpc.insecure_channel(self.endpoint, options=_CHANNEL_OPTIONS) as channel:
                path = packet_path(self.endpoint) if self._check_peer(channel) else None
                packets = None if path is None else self._connect_packets(path)
                if packets is None:
                    self._follow_stream(channel)
                    return
            # Nothing of gRPC goes on beside the packets.
            self._follow_packets(packets)
        except grpc.RpcError as error:
            raise domain_error(error) from error

    def _check_peer(self, channel: grpc.Channel) -> bool:
        """Whether the service listens on a packet socket, too."""
        call = pb_grpc.PredictorStub(channel).GetInfo.future(pb.PredictorGetInfoRequest(), timeout=INFO_DEADLINE_S)
        self._hold(call)
        try:
            info = call.result()
        except grpc.FutureCancelledError as error:
            raise Unavailable("This client was closed") from error
        check_schema(info.service, self._peer)
        spec, model = self._spec, info.model
        if model.fingerprint != spec.fingerprint:
            raise ModelMismatch(
                f"This node serves {spec.name} (fingerprint {spec.fingerprint}), but the predictor at {self.endpoint} "
                f"is for {model.name} (fingerprint {model.fingerprint})."
            )
        return info.packets

    def _connect_packets(self, path: Path) -> PacketChannel | None:
        """None where the service's socket cannot be reached, as from another container."""
        try:
            return PacketChannel.connect(path, self._patience.welcome_s)
        except Unavailable as error:
            logger.info("The predictor is talked to over gRPC: %s.", error)
            return None

    def _hold(self, call: grpc.Call) -> None:
        """`close` cancels it, before or after it looks."""
        self._call = call
        if self._closing.is_set():
            call.cancel()

    def _follow_packets(self, channel: PacketChannel) -> None:
        """Holds the session until it breaks, then raises why."""
        carrier = PacketCarrier(channel, encode_event, lambda data: conversation.receive(data))
        session = HintSession(self._spec.num_moe_layers, carrier)
        conversation = Conversation(self._peer, self._spec, session, self._hints)
        try:
            self._channel = channel
            with suppress(Unavailable):  # what the service said before it went tells more
                channel.send(hello_message(self._info, self._spec, self._packet_rows))
            while session.active is None and not self._closing.is_set():
                message = channel.receive(max(0.001, self._patience.welcome_s - session.age_s))
                if message is None:
                    raise DeadlineExceeded(f"No welcome came within {self._patience.welcome_s:g} s.")
                conversation.receive(message)
            if session.active is None:
                raise Unavailable("This client was closed")
            # From here on the channel is the engine thread's.
            self._session, self._carrier = session, carrier
            self._note_connected(session)
            self._await_end(channel, session, carrier)
        finally:
            self._channel = self._carrier = None
            failure = carrier.finish()
            self._session, self._past = None, session.add_to(self._past)
        raise failure

    def _await_end(self, channel: PacketChannel, session: HintSession, carrier: PacketCarrier) -> None:
        """Until the service or the carrier hangs up; what comes to be read is the engine thread's.

        Raises:
            DeadlineExceeded: the service neither reads nor says anything.
        """
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLRDHUP)
        if poll.poll(max(0.0, self._patience.settled_s - session.age_s) * 1e3):
            return
        self._note_connected(session)
        while not poll.poll(self._patience.silence_s * 1e3):
            if carrier.is_stuck:
                raise DeadlineExceeded(f"It has neither read nor said anything for {self._patience.silence_s:g} s.")

    def _follow_stream(self, channel: grpc.Channel) -> None:
        outgoing = OutgoingQueue()
        session = HintSession(self._spec.num_moe_layers, outgoing)
        conversation = Conversation(self._peer, self._spec, session, self._hints)
        predict: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_PREDICT)
        # No deadline: a session lasts as long as both sides; keepalive notices a dead peer.
        call = predict(self._requests(outgoing))
        self._hold(call)
        unwelcome = threading.Timer(self._patience.welcome_s, call.cancel)
        unwelcome.start()
        try:
            self._session = session
            for data in call:
                if self._closing.is_set():
                    return
                conversation.receive(data)
                if session.active is not None:
                    unwelcome.cancel()
                    self._note_connected(session)
        except grpc.RpcError as error:
            if session.active is None and session.age_s >= self._patience.welcome_s:
                raise DeadlineExceeded(f"No welcome came within {self._patience.welcome_s:g} s.") from error
            raise
        finally:
            unwelcome.cancel()
            self._call = None
            self._session, self._past = None, session.add_to(self._past)
            outgoing.end()
            call.cancel()

    def _note_connected(self, session: HintSession) -> None:
        """Told of every sign of life after the welcome."""
        has_settled = session.age_s >= self._patience.settled_s
        if has_settled:
            self._retry_s = self._patience.first_retry_s
        assert session.active is not None, "a session begins with a welcome"
        self.log.connected(session.active.version, has_settled)
        if self._noted_session is not session:
            self._noted_session = session
            self._noted()
