"""What the learner's process makes of the packets of the feed. Best effort: any of them may be missing."""

from google.protobuf.message import DecodeError

from predictor_service.feed import Overheard
from predictor_service.learner.gatherer import Gatherer
from promoe.errors import InvalidInput
from promoe.hint_wire import decode_observation, decode_requests_ended, decode_step_start, decode_version
from promoe.v1 import predictor_pb2 as pb


def tell(packet: bytes, gatherer: Gatherer) -> None:
    """Decodes a packet and tells the gatherer what it says; raises InvalidInput for one that cannot be read."""
    overheard = Overheard.decode(packet)
    if not overheard.said:
        gatherer.end_session(overheard.session)
        return
    try:
        answer = pb.PredictResponse.FromString(overheard.answer)
        _tell_request(overheard.session, pb.PredictRequest.FromString(overheard.said), gatherer)
        if answer.WhichOneof("event") == "welcome":
            gatherer.welcomed(decode_version(answer.welcome.active))
    except (DecodeError, ValueError) as error:
        raise InvalidInput(f"A packet cannot be read: {error}.") from error


def _tell_request(session: int, request: pb.PredictRequest, gatherer: Gatherer) -> None:
    match request.WhichOneof("event"):
        case "step_start":
            gatherer.begin_step(session, decode_step_start(request.step_start))
        case "observation":
            gatherer.observe(session, decode_observation(request.observation))
        case "requests_ended":
            gatherer.end_requests(session, decode_requests_ended(request.requests_ended).request_ids)
        case _:  # a hello says nothing of documents
            return
