"""Between the nouns of `promoe.hint` and their protobuf messages, for both ends; numpy only.

Decoding checks the structure (what cannot be turned into the noun at all), not whether it makes sense for a model.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from promoe.hint import (
    Float32Array,
    Hint,
    LayerRouting,
    Observation,
    ObservedKind,
    PredictorVersion,
    RequestsEnded,
    StepSpan,
    StepStart,
)
from promoe.model_spec import Dtype
from promoe.v1 import predictor_pb2
from promoe.wire import DTYPE_TO_WIRE

_DTYPE_OF_WIRE: Final = {number: dtype for dtype, number in DTYPE_TO_WIRE.items()}

_KIND_TO_WIRE: Final = {
    ObservedKind.NONE: predictor_pb2.OBSERVED_KIND_NONE,
    ObservedKind.LAYER_INPUT: predictor_pb2.OBSERVED_KIND_LAYER_INPUT,
    ObservedKind.ROUTER_INPUT: predictor_pb2.OBSERVED_KIND_ROUTER_INPUT,
}
_KIND_OF_WIRE: Final = {number: kind for kind, number in _KIND_TO_WIRE.items()}

_IDS: Final = np.dtype("<u2")
_LARGEST_ID: Final = 0xFFFF
_FLOAT32: Final = np.dtype("<f4")
_FLOAT16: Final = np.dtype("<f2")
_BFLOAT16_BITS: Final = np.dtype("<u2")


def encode_tensor(values: Float32Array, dtype: Dtype) -> predictor_pb2.Tensor:
    """To the wire, rounded to nearest where `dtype` is narrower; what came from that dtype is kept exactly."""
    if dtype is Dtype.FLOAT32:
        data = np.ascontiguousarray(values, _FLOAT32).tobytes()
    elif dtype is Dtype.FLOAT16:
        with np.errstate(over="ignore"):  # beyond its range is infinite, as it is in torch
            data = values.astype(_FLOAT16).tobytes()
    else:
        data = _bfloat16_bits(values).tobytes()
    message = predictor_pb2.Tensor()
    fill_tensor(message, data, values.shape, dtype)
    return message


def fill_tensor(message: predictor_pb2.Tensor, data: bytes, shape: Sequence[int], dtype: Dtype) -> None:
    """To the wire, in place, from what is little-endian and row-major already."""
    message.dtype = DTYPE_TO_WIRE[dtype]
    message.shape.extend(shape)
    message.data = data


def decode_tensor(message: predictor_pb2.Tensor) -> Float32Array:
    """From the wire, widened to float32.

    Raises:
        ValueError: an unknown dtype, or as many bytes as the shape does not have.
    """
    dtype = _DTYPE_OF_WIRE.get(message.dtype)
    if dtype is None:
        allowed = ", ".join(member.value for member in Dtype)
        raise ValueError(f"tensor.dtype is {message.dtype}; allowed: {allowed}")
    shape = tuple(message.shape)
    if math.prod(shape) * dtype.itemsize != len(message.data):
        raise ValueError(f"tensor.data has {len(message.data)} bytes, which is not a {dtype.value} of shape {shape}")
    if dtype is Dtype.FLOAT32:
        values = np.frombuffer(message.data, _FLOAT32).astype(np.float32)
    elif dtype is Dtype.FLOAT16:
        values = np.frombuffer(message.data, _FLOAT16).astype(np.float32)
    else:
        values = (np.frombuffer(message.data, _BFLOAT16_BITS).astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def _bfloat16_bits(values: Float32Array) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even."""
    bits = np.ascontiguousarray(values, _FLOAT32).view(np.uint32)
    halves = bits.view(_BFLOAT16_BITS).reshape(*bits.shape, 2)
    if not halves[..., 0].any():  # what was bfloat16 before, as most models' hidden states were
        return halves[..., 1]
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # Rounding a NaN could make it an infinity: its upper half is kept, with a bit that says NaN.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(_BFLOAT16_BITS)


def encode_step_start(start: StepStart) -> predictor_pb2.StepStart:
    """To the wire."""
    spans = [_encode_span(span) for span in start.spans]
    return predictor_pb2.StepStart(step=start.step, spans=spans, version=start.version)


def decode_step_start(message: predictor_pb2.StepStart) -> StepStart:
    """From the wire; raises ValueError for a span without a phase."""
    spans = tuple(_decode_span(span) for span in message.spans)
    return StepStart(message.step, spans, version=message.version)


def _encode_span(span: StepSpan) -> predictor_pb2.StepSpan:
    phase = predictor_pb2.STEP_PHASE_PREFILL if span.is_prefill else predictor_pb2.STEP_PHASE_DECODE
    return predictor_pb2.StepSpan(request_id=span.request_id, num_tokens=span.num_tokens, phase=phase)


def _decode_span(message: predictor_pb2.StepSpan) -> StepSpan:
    if message.phase not in (predictor_pb2.STEP_PHASE_PREFILL, predictor_pb2.STEP_PHASE_DECODE):
        raise ValueError(f"span.phase is {message.phase}; allowed: STEP_PHASE_PREFILL, STEP_PHASE_DECODE")
    return StepSpan(message.request_id, message.num_tokens, message.phase == predictor_pb2.STEP_PHASE_PREFILL)


def encode_requests_ended(ended: RequestsEnded) -> predictor_pb2.RequestsEnded:
    """To the wire."""
    return predictor_pb2.RequestsEnded(request_ids=ended.request_ids)


def decode_requests_ended(message: predictor_pb2.RequestsEnded) -> RequestsEnded:
    """From the wire."""
    return RequestsEnded(tuple(message.request_ids))


def encode_observation(observation: Observation, dtype: Dtype) -> predictor_pb2.Observation:
    """To the wire. `dtype`: of the hidden states on their way, for example what the model computes in."""
    hidden = observation.hidden_RD
    return predictor_pb2.Observation(
        step=observation.step,
        layer=observation.layer,
        rows=observation.rows,
        hidden=None if hidden is None else encode_tensor(hidden, dtype),
        routings=[encode_routing(routing) for routing in observation.routings],
        num_tokens=observation.num_tokens,
    )


def encode_routing(routing: LayerRouting) -> predictor_pb2.LayerRouting:
    """To the wire."""
    message = predictor_pb2.LayerRouting()
    fill_routing(message, routing)
    return message


def fill_routing(message: predictor_pb2.LayerRouting, routing: LayerRouting) -> None:
    """To the wire, in place."""
    message.layer = routing.layer
    message.topk_ids = routing.topk_ids_RK.astype(_IDS, copy=False).tobytes()
    if routing.ready is not None:
        message.ready = _bits_of(routing.ready)


def _bits_of(experts: tuple[int, ...]) -> bytes:
    """A bit each; at least one byte, so that none READY is told from nobody saying."""
    bits = 0
    for expert in experts:
        bits |= 1 << expert
    return bits.to_bytes(max(1, (bits.bit_length() + 7) // 8), "little")


def _experts_of(bits: bytes) -> tuple[int, ...]:
    return tuple(np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")).tolist())


def decode_observation(message: predictor_pb2.Observation) -> Observation:
    """From the wire.

    Raises:
        ValueError: hidden states or routings that are not those of as many rows as it names.
    """
    num_rows = len(message.rows)
    hidden_RD = decode_tensor(message.hidden) if message.HasField("hidden") else None
    if hidden_RD is not None and (hidden_RD.ndim != 2 or hidden_RD.shape[0] != num_rows):
        raise ValueError(f"observation.hidden has the shape {hidden_RD.shape}; expected ({num_rows}, hidden size)")
    return Observation(
        step=message.step,
        layer=message.layer,
        rows=tuple(message.rows),
        num_tokens=message.num_tokens,
        hidden_RD=hidden_RD,
        routings=tuple(_decode_routing(routing, num_rows) for routing in message.routings),
    )


def _decode_routing(message: predictor_pb2.LayerRouting, num_rows: int) -> LayerRouting:
    nbytes = len(message.topk_ids)
    if nbytes % (max(1, num_rows) * _IDS.itemsize) or (nbytes and not num_rows):
        raise ValueError(f"routing.topk_ids has {nbytes} bytes, which are not {num_rows} rows of 16-bit numbers")
    ids = np.frombuffer(message.topk_ids, _IDS).astype(np.uint16)
    if len(message.ready) > _LARGEST_ID // 8 + 1:
        raise ValueError(f"routing.ready has {len(message.ready)} bytes; allowed: a bit for each expert")
    ready = _experts_of(message.ready) if message.ready else None
    return LayerRouting(message.layer, ids.reshape(num_rows, -1) if num_rows else ids.reshape(0, 0), ready)


def encode_hint(hint: Hint) -> predictor_pb2.Hint:
    """To the wire."""
    return predictor_pb2.Hint(
        step=hint.step,
        layer=hint.layer,
        observed_layer=hint.observed_layer,
        observed_step=hint.observed_step,
        experts=hint.experts.tolist(),
        scores=hint.scores.tolist(),
        num_expected=hint.num_expected,
        version=hint.version,
    )


def decode_hint(message: predictor_pb2.Hint) -> Hint:
    """From the wire; says nothing about layers, duplicates or scores.

    Raises:
        ValueError: experts and scores do not pair, or an expert beyond 16 bits.
    """
    if len(message.experts) != len(message.scores):
        raise ValueError(f"a hint has {len(message.experts)} experts and {len(message.scores)} scores")
    experts = list(message.experts)
    if experts and max(experts) > _LARGEST_ID:
        raise ValueError(f"hint.experts has {max(experts)}; allowed: up to {_LARGEST_ID}")
    return Hint(
        step=message.step,
        layer=message.layer,
        observed_step=message.observed_step,
        observed_layer=message.observed_layer,
        experts=np.array(experts, np.uint16),
        scores=np.array(list(message.scores), np.float32),
        num_expected=message.num_expected,
        version=message.version,
    )


def encode_version(version: PredictorVersion) -> predictor_pb2.PredictorVersion:
    """To the wire."""
    return predictor_pb2.PredictorVersion(
        version=version.version,
        predictor=version.predictor,
        observed=_KIND_TO_WIRE[version.observed],
        lookaheads=version.lookaheads,
        calibrated=version.calibrated,
        wants_routing=version.wants_routing,
        observe_every=version.observe_every,
        wants_ready=version.wants_ready,
    )


def decode_version(message: predictor_pb2.PredictorVersion) -> PredictorVersion:
    """From the wire; raises ValueError for a version without a name or an unknown kind of hidden states."""
    observed = _KIND_OF_WIRE.get(message.observed)
    if observed is None:
        raise ValueError(f"version.observed is {message.observed}; allowed: {', '.join(k.value for k in ObservedKind)}")
    if not message.version:
        raise ValueError("version.version is empty; expected `name@version`")
    return PredictorVersion(
        version=message.version,
        predictor=message.predictor,
        observed=observed,
        lookaheads=tuple(message.lookaheads),
        calibrated=message.calibrated,
        wants_routing=message.wants_routing,
        observe_every=max(1, message.observe_every),
        wants_ready=message.wants_ready,
    )
