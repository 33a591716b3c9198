"""Between trace events and their protobuf messages. Hidden states travel as bfloat16, as a trace file keeps them."""

from typing import Final

import numpy as np

from promoe.hint import StepStart
from promoe.hint_wire import (
    decode_hint,
    decode_step_start,
    decode_tensor,
    encode_hint,
    encode_step_start,
    encode_tensor,
)
from promoe.model_spec import Dtype
from promoe.trace_events import (
    HintEvent,
    HintFate,
    LayerEvent,
    LoadEvent,
    LoadReason,
    StepEvent,
    TraceBatch,
    TraceEvent,
)
from promoe.v1 import inference_pb2
from promoe.wire import decode_expert

_IDS: Final = np.dtype("<u2")

_FATE_TO_WIRE: Final = {
    HintFate.TAKEN: inference_pb2.HINT_FATE_TAKEN,
    HintFate.LATE: inference_pb2.HINT_FATE_LATE,
    HintFate.INVALID: inference_pb2.HINT_FATE_INVALID,
    HintFate.WRONG_VERSION: inference_pb2.HINT_FATE_WRONG_VERSION,
    HintFate.OVERFLOW: inference_pb2.HINT_FATE_OVERFLOW,
}
_FATE_OF_WIRE: Final = {number: fate for fate, number in _FATE_TO_WIRE.items()}

_REASON_TO_WIRE: Final = {
    LoadReason.DEMAND: inference_pb2.LOAD_REASON_DEMAND,
    LoadReason.PREFETCH: inference_pb2.LOAD_REASON_PREFETCH,
    LoadReason.STREAM: inference_pb2.LOAD_REASON_STREAM,
}
_REASON_OF_WIRE: Final = {number: reason for reason, number in _REASON_TO_WIRE.items()}


def encode_batch(batch: TraceBatch, began_s: float = 0.0) -> inference_pb2.TraceResponse:
    """To the wire. `began_s`: when the trace began on the events' clock; on the wire times count from there.

    Messages are filled in place, a third of the cost of putting them together: the node computes meanwhile.
    """
    message = inference_pb2.TraceResponse(dropped_steps=batch.dropped_steps)
    for event in batch.events:
        _fill_event(message.events.add(), event, began_s)
    return message


def decode_batch(message: inference_pb2.TraceResponse) -> TraceBatch:
    """From the wire; raises ValueError as `decode_event` does."""
    return TraceBatch(tuple(decode_event(event) for event in message.events), message.dropped_steps)


def encode_event(event: TraceEvent, began_s: float = 0.0) -> inference_pb2.TraceEvent:
    """To the wire; see `encode_batch`."""
    message = inference_pb2.TraceEvent()
    _fill_event(message, event, began_s)
    return message


def decode_event(message: inference_pb2.TraceEvent) -> TraceEvent:
    """From the wire.

    Raises:
        ValueError: it is no event that this version knows, or its parts do not fit each other.
    """
    kind = message.WhichOneof("event")
    if kind == "layer":
        return _decode_layer(message.layer)
    if kind == "load":
        return _decode_load(message.load)
    if kind == "hint":
        return _decode_hint_event(message.hint)
    if kind == "step":
        step = message.step
        start = decode_step_start(step.start)
        return StepEvent(step.at_s, start.step, start.spans, tuple(step.ended_request_ids), step.link_bytes_per_s)
    raise ValueError("event is not set; allowed: step, layer, hint, load")


def _fill_event(message: inference_pb2.TraceEvent, event: TraceEvent, began_s: float) -> None:
    if isinstance(event, LayerEvent):
        _fill_layer(message.layer, event, began_s)
    elif isinstance(event, LoadEvent):
        _fill_load(message.load, event, began_s)
    elif isinstance(event, HintEvent):
        _fill_hint(message.hint, event, began_s)
    else:
        message.step.at_s = event.at_s - began_s
        message.step.start.CopyFrom(encode_step_start(StepStart(event.step, event.spans)))
        message.step.ended_request_ids.extend(event.ended_request_ids)
        message.step.link_bytes_per_s = event.link_bytes_per_s


def _fill_layer(message: inference_pb2.TraceLayer, event: LayerEvent, began_s: float) -> None:
    message.at_s = event.at_s - began_s
    message.end_s = event.end_s - began_s
    message.step = event.step
    message.layer = event.layer
    message.num_tokens = event.topk_ids_TK.shape[0]
    message.topk_ids = event.topk_ids_TK.astype(_IDS, copy=False).tobytes()
    message.hits.extend(event.hits)
    message.misses.extend(event.misses)
    message.late.extend(event.late)
    message.stall_s = event.stall_s
    message.rows.extend(event.rows)
    if event.layer_input_RD is not None:
        message.layer_input.CopyFrom(encode_tensor(event.layer_input_RD, Dtype.BFLOAT16))
    if event.router_input_RD is not None:
        message.router_input.CopyFrom(encode_tensor(event.router_input_RD, Dtype.BFLOAT16))
    if event.last_output_RD is not None:
        message.last_output.CopyFrom(encode_tensor(event.last_output_RD, Dtype.BFLOAT16))


def _decode_layer(message: inference_pb2.TraceLayer) -> LayerEvent:
    ids = np.frombuffer(message.topk_ids, _IDS).astype(np.uint16)
    num_tokens = message.num_tokens
    if num_tokens == 0 or ids.size % num_tokens:
        raise ValueError(f"layer.topk_ids has {ids.size} experts, which are not those of {num_tokens} tokens")
    hidden = {
        name: decode_tensor(getattr(message, name))
        for name in ("layer_input", "router_input", "last_output")
        if message.HasField(name)
    }
    for name, values in hidden.items():
        if values.ndim != 2 or values.shape[0] != len(message.rows):
            raise ValueError(f"layer.{name} has the shape {values.shape}; expected ({len(message.rows)}, hidden size)")
    return LayerEvent(
        at_s=message.at_s,
        end_s=message.end_s,
        step=message.step,
        layer=message.layer,
        topk_ids_TK=ids.reshape(num_tokens, -1),
        hits=tuple(message.hits),
        misses=tuple(message.misses),
        late=tuple(message.late),
        stall_s=message.stall_s,
        rows=tuple(message.rows),
        layer_input_RD=hidden.get("layer_input"),
        router_input_RD=hidden.get("router_input"),
        last_output_RD=hidden.get("last_output"),
    )


def _fill_load(message: inference_pb2.TraceLoad, event: LoadEvent, began_s: float) -> None:
    message.at_s = event.at_s - began_s
    message.begin_s = event.begin_s - began_s
    message.end_s = event.end_s - began_s
    expert = message.expert
    expert.layer, expert.expert = event.expert
    message.reason = _REASON_TO_WIRE[event.reason]
    message.nbytes = event.nbytes
    message.look = event.look
    message.is_paused = event.is_paused


def _decode_load(message: inference_pb2.TraceLoad) -> LoadEvent:
    reason = _REASON_OF_WIRE.get(message.reason)
    if reason is None:
        raise ValueError(f"load.reason is {message.reason}; allowed: {', '.join(r.value for r in LoadReason)}")
    return LoadEvent(
        at_s=message.at_s,
        begin_s=message.begin_s,
        end_s=message.end_s,
        expert=decode_expert(message.expert),
        reason=reason,
        nbytes=message.nbytes,
        look=message.look,
        is_paused=message.is_paused,
    )


def _fill_hint(message: inference_pb2.TraceHint, event: HintEvent, began_s: float) -> None:
    message.at_s = event.at_s - began_s
    message.hint.CopyFrom(encode_hint(event.hint))
    message.fate = _FATE_TO_WIRE[event.fate]
    if event.latency_s is not None:
        message.latency_s = event.latency_s
    message.look = event.look


def _decode_hint_event(message: inference_pb2.TraceHint) -> HintEvent:
    fate = _FATE_OF_WIRE.get(message.fate)
    if fate is None:
        raise ValueError(f"hint.fate is {message.fate}; allowed: {', '.join(f.value for f in HintFate)}")
    latency_s = message.latency_s if message.HasField("latency_s") else None
    return HintEvent(message.at_s, decode_hint(message.hint), fate, latency_s, message.look)
