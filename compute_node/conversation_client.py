"""One session's messages with the predictor: encodes what is told, checks and files what is answered.

The predictor is best effort: what cannot be used is counted and never reaches the expert cache; what fails in a way
that nobody thought of ends the session, and never a step of the engine thread, which may be the one that reads. Knows
no carrier.
"""

import logging
from typing import Final

import torch
from google.protobuf.message import DecodeError

from compute_node.expert_weights import TORCH_DTYPES
from compute_node.hint_checks import fault_of
from compute_node.hint_inbox import HintTaker, ReceivedHint
from compute_node.hint_session import HintSession
from compute_node.layer_sample import LayerSample
from compute_node.outgoing import OutgoingEvent
from promoe.errors import InternalError, InvalidInput, PromoeError, error_of_code
from promoe.hint import StepStart
from promoe.hint_wire import (
    decode_hint,
    decode_version,
    encode_requests_ended,
    encode_step_start,
    fill_routing,
    fill_tensor,
)
from promoe.model_spec import ModelSpec
from promoe.trace_events import HintFate
from promoe.v1 import model_pb2
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import check_schema, encode_spec

logger = logging.getLogger(__name__)

_DTYPES: Final = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


NBYTES_A_HINT: Final = 2048
"""A message is charged for its size, too, by the most that a hint is long."""


def hello_message(info: model_pb2.ServiceInfo, spec: ModelSpec, max_rows: int) -> bytes:
    """The first message of every session."""
    hello = pb.PredictHello(service=info, model=encode_spec(spec), max_rows=max_rows)
    return pb.PredictRequest(hello=hello).SerializeToString()


def encode_event(event: OutgoingEvent) -> bytes:
    """One message; waits for an observation's hidden states. Raises InternalError after a bug."""
    try:
        return _encode(event)
    except Exception as error:
        raise _bug(error) from error


def _encode(event: OutgoingEvent) -> bytes:
    if isinstance(event, LayerSample):
        request = pb.PredictRequest()
        _fill_observation(request.observation, event)
    elif isinstance(event, StepStart):
        request = pb.PredictRequest(step_start=encode_step_start(event))
    else:
        request = pb.PredictRequest(requests_ended=encode_requests_ended(event))
    return request.SerializeToString()


class Conversation:
    """What the service answers in one session.

    Args:
        peer: the service, for errors.
        spec: the served model.
        session: counts.
        hints: takes those that passed the checks.
    """

    def __init__(self, peer: str, spec: ModelSpec, session: HintSession, hints: HintTaker) -> None:
        self._peer = peer
        self._spec = spec
        self._session = session
        self._hints = hints

    def receive(self, data: bytes) -> None:
        """Takes one message; raises PromoeError for what ends the session."""
        try:
            self._receive(data)
        except PromoeError:
            raise
        except Exception as error:
            raise _bug(error) from error

    def _receive(self, data: bytes) -> None:
        try:
            response = pb.PredictResponse.FromString(data)
        except DecodeError as error:
            raise InvalidInput(f"The predictor sends what cannot be decoded: {error}.") from error
        self._session.charge(1 + len(response.hints.hints) + len(data) // NBYTES_A_HINT)
        if response.HasField("end"):
            raise error_of_code(response.end.status_code, response.end.reason)
        if response.HasField("welcome"):
            self._session.schema = check_schema(response.welcome.service, self._peer)
            _welcome(self._session, response.welcome)
            return
        for message in response.hints.hints:
            self._receive_hint(message)

    def _receive_hint(self, message: pb.Hint) -> None:
        session = self._session
        if len(message.experts) > self._spec.num_experts:
            # Before it is decoded, which takes as long as it is.
            session.refuse(HintFate.INVALID, f"{len(message.experts)} experts of {self._spec.num_experts}")
            return
        try:
            hint = decode_hint(message)
        except ValueError as error:
            session.refuse(HintFate.INVALID, str(error))
            return
        fault = fault_of(hint, self._spec.num_moe_layers, self._spec.num_experts, session.announced)
        if fault is not None:
            session.refuse(fault, f"{hint.version}, layer {hint.layer}, experts {hint.experts[:8]}")
            return
        latency_s = session.latency_s(hint.observed_step, hint.observed_layer)
        self._hints.put(ReceivedHint(hint, latency_s, session.announced[hint.version].calibrated))


def _bug(error: Exception) -> InternalError:
    logger.error("A bug ends the session with the predictor.", exc_info=error)
    return InternalError(f"A message could not be handled ({type(error).__name__}); this node's log has the details.")


def _fill_observation(message: pb.Observation, sample: LayerSample) -> None:
    """Waits for the copy; hidden states go out as they are, without a detour over float32."""
    message.step = sample.step
    message.layer = sample.layer
    message.num_tokens = sample.num_tokens
    message.rows.extend(sample.rows)
    if sample.hidden is not None:
        hidden_RD = sample.hidden.wait().contiguous()
        data = hidden_RD.view(torch.uint8).numpy().tobytes()
        fill_tensor(message.hidden, data, hidden_RD.shape, _DTYPES[hidden_RD.dtype])
    for routing in sample.routings:
        fill_routing(message.routings.add(), routing)


def _welcome(session: HintSession, message: pb.PredictWelcome) -> None:
    """Raises InvalidInput for a welcome that cannot be understood."""
    try:
        active = decode_version(message.active)
        canary = decode_version(message.canary) if message.HasField("canary") else None
    except ValueError as error:
        raise InvalidInput(f"The predictor's welcome cannot be understood: {error}.") from error
    if message.max_rows == 0:
        raise InvalidInput("The predictor's welcome wants no rows at all.")
    session.welcome(active, message.max_rows, canary)
