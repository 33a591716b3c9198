"""Reads the feed: packets with what sessions are told and what they answer. Best effort: any of them may be missing.

1 byte kind, 8 bytes session (little-endian), then a PredictRequest (1), a PredictResponse (2), or nothing (3)
"""

import struct
from enum import IntEnum
from typing import Final

from google.protobuf.message import DecodeError

from predictor_service.learner.gatherer import Gatherer
from promoe.errors import InvalidInput
from promoe.hint_wire import decode_observation, decode_requests_ended, decode_step_start, decode_version
from promoe.v1 import predictor_pb2 as pb

HEADER: Final = struct.Struct("<BQ")


class PacketKind(IntEnum):
    """What is behind the header."""

    REQUEST = 1
    RESPONSE = 2
    SESSION_ENDED = 3


def tell(packet: bytes, gatherer: Gatherer) -> None:
    """Decodes a packet and tells the gatherer what it says; raises InvalidInput for one that cannot be read."""
    if len(packet) < HEADER.size:
        raise InvalidInput(f"A packet has {len(packet)} bytes, which is less than its header.")
    kind, session = HEADER.unpack_from(packet)
    message = packet[HEADER.size :]
    try:
        match kind:
            case PacketKind.REQUEST:
                _tell_request(session, pb.PredictRequest.FromString(message), gatherer)
            case PacketKind.RESPONSE:
                response = pb.PredictResponse.FromString(message)
                if response.WhichOneof("event") == "welcome":
                    gatherer.welcomed(decode_version(response.welcome.active))
            case PacketKind.SESSION_ENDED:
                gatherer.end_session(session)
            case _:
                raise InvalidInput(f"A packet is of the kind {kind}; known: 1, 2, 3.")
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
