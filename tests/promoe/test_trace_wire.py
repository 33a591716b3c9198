"""Trace events survive the wire; what is no event is refused with its field's name."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from promoe.trace_events import LayerEvent, LoadEvent, TraceEvent
from promoe.trace_wire import decode_event, encode_event
from promoe.v1 import inference_pb2
from tests.promoe.traces import TRACE_EVENTS, MadeUpRun, same_event


@given(TRACE_EVENTS)
def test_events_survive_the_wire(event: TraceEvent) -> None:
    message = inference_pb2.TraceEvent.FromString(encode_event(event).SerializeToString())
    assert same_event(decode_event(message), event)


def test_on_the_wire_times_count_from_the_beginning() -> None:
    at_s = {"step": 2.0, "layer": 2.0, "load": 2.0, "hint": 2.0}
    for event in MadeUpRun().events():
        late = replace(event, at_s=12.0)
        if isinstance(late, LayerEvent | LoadEvent):
            late = replace(late, end_s=13.0)
        if isinstance(late, LoadEvent):
            late = replace(late, begin_s=9.0)
        message = encode_event(late, began_s=10.0)
        kind = str(message.WhichOneof("event"))
        decoded = decode_event(message)
        assert decoded.at_s == at_s.pop(kind, 2.0)
        if isinstance(decoded, LayerEvent | LoadEvent):
            assert decoded.end_s == 3.0
        if isinstance(decoded, LoadEvent):
            assert decoded.begin_s == -1.0
    assert not at_s, "every kind was there"


def test_hidden_states_travel_as_bfloat16() -> None:
    hidden_RD = np.full((1, 100), np.pi, np.float32)
    event = LayerEvent(0, 0, 1, 0, np.zeros((1, 2), np.uint16), (0,), (), (), 0, (0,), hidden_RD, 2 * hidden_RD)
    message = encode_event(event)
    assert len(message.layer.layer_input.data) == 200
    decoded = decode_event(message)
    assert isinstance(decoded, LayerEvent)
    assert decoded.router_input_RD is not None
    np.testing.assert_allclose(decoded.router_input_RD, 2 * hidden_RD, rtol=2**-8)


def _layer(**fields: object) -> inference_pb2.TraceEvent:
    whole = {"num_tokens": 1, "topk_ids": b"\0\0\1\0", "hits": [0, 1]} | fields
    return inference_pb2.TraceEvent(layer=inference_pb2.TraceLayer(**whole))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (inference_pb2.TraceEvent(), "event is not set; allowed: step, layer, hint, load"),
        (_layer(num_tokens=3), "layer.topk_ids has 2 experts, which are not those of 3 tokens"),
        (_layer(num_tokens=0), "layer.topk_ids has 2 experts, which are not those of 0 tokens"),
        (_layer(topk_ids=b"\0"), "buffer size must be a multiple of element size"),
        (
            _layer(router_input={"dtype": 3, "shape": [1, 2], "data": bytes(4)}),
            r"layer.router_input has the shape \(1, 2\); expected \(0, hidden size\)",
        ),
        (inference_pb2.TraceEvent(load=inference_pb2.TraceLoad()), "load.reason is 0; allowed: demand, prefetch"),
        (inference_pb2.TraceEvent(hint=inference_pb2.TraceHint()), "hint.fate is 0; allowed: taken, late"),
    ],
)
def test_what_is_no_event_is_refused(message: inference_pb2.TraceEvent, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_event(message)


def test_a_step_on_the_wire_is_small() -> None:
    """A decode step of 30 layers with their hints and loads stays far below what a link or a reader notices."""
    run = MadeUpRun(num_layers=30, num_experts=32, experts_per_token=8, num_requests=1, decode_steps=1, prompt_tokens=1)
    events = list(run.events())
    sizes = [encode_event(event).ByteSize() for event in events]
    assert sum(sizes) / 2 < 30 * 500
