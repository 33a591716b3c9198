"""What fails in a way that nobody thought of ends the session with the predictor, not the engine's thread."""

import logging
from dataclasses import replace

import pytest
import torch

from compute_node.conversation_client import Conversation, encode_event
from compute_node.device.cpu import DONE
from compute_node.device.seam import HostCopy
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.hint_session import HintSession
from compute_node.layer_sample import LayerSample
from compute_node.outgoing import OutgoingQueue
from promoe.errors import InternalError
from promoe.hint import ObservedKind
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import NUM_LAYERS, SPEC
from tests.scripted_predictor import VERSION, good_hint, hints, welcome


class BrokenTaker:
    """Has a bug."""

    def put(self, received: ReceivedHint) -> None:
        raise ZeroDivisionError


def test_a_bug_in_taking_a_hint_ends_the_session_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    conversation = Conversation("The predictor", SPEC, HintSession(NUM_LAYERS, OutgoingQueue()), BrokenTaker())
    conversation.receive(welcome().SerializeToString())
    message = hints(good_hint(pb.Observation(step=1, layer=0))).SerializeToString()
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError, match="ZeroDivisionError"):
        conversation.receive(message)
    assert caplog.records[0].exc_info is not None


def test_a_bug_in_telling_ends_the_session() -> None:
    hidden = HostCopy(torch.zeros(1, SPEC.hidden_size, dtype=torch.complex64), DONE)
    sample = LayerSample(1, 0, ObservedKind.LAYER_INPUT, (0,), 1, hidden, ())
    with pytest.raises(InternalError, match="KeyError"):
        encode_event(sample)


def test_what_is_an_order_only_is_said_to_be_one() -> None:
    inbox = HintInbox()
    inbox.calibrate = lambda hint: replace(hint, scores=hint.scores * 0)
    conversation = Conversation("The predictor", SPEC, HintSession(NUM_LAYERS, OutgoingQueue()), inbox)
    for version in (VERSION, replace(VERSION, version="order@1", calibrated=False)):
        conversation.receive(welcome(version).SerializeToString())
        conversation.receive(hints(good_hint(pb.Observation(step=1), version.version)).SerializeToString())
    assert [float(received.hint.scores.max()) > 0 for received in inbox.drain()] == [True, False]
