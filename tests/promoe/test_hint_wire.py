"""What one end says to the other is what the other end reads; what makes no sense is refused by name."""

from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from promoe import hint_wire
from promoe.hint import (
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
from promoe.v1 import model_pb2, predictor_pb2

ROWS_WIDE = hnp.array_shapes(min_dims=2, max_dims=2, max_side=5)
FLOATS = hnp.arrays(np.float32, ROWS_WIDE, elements=st.floats(width=32))
TORCH = {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16}


@given(FLOATS, st.sampled_from(list(Dtype)))
@settings(max_examples=200, deadline=None)
def test_tensors_are_rounded_as_torch_rounds_them(values: np.ndarray, dtype: Dtype) -> None:
    message = predictor_pb2.Tensor.FromString(hint_wire.encode_tensor(values, dtype).SerializeToString())
    expected = torch.from_numpy(values).to(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(hint_wire.decode_tensor(message), expected)


def test_every_bfloat16_survives() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    values = bits.view(np.float32).reshape(256, 256)
    decoded = hint_wire.decode_tensor(hint_wire.encode_tensor(values, Dtype.BFLOAT16))
    np.testing.assert_array_equal(decoded, values)
    assert len(hint_wire.encode_tensor(values, Dtype.BFLOAT16).data) == values.size * 2


def test_a_view_with_strides_is_written_in_row_order() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    for dtype in Dtype:
        np.testing.assert_array_equal(hint_wire.decode_tensor(hint_wire.encode_tensor(values, dtype)), values)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (predictor_pb2.Tensor(shape=[1], data=b"\0\0"), "dtype is 0"),
        (predictor_pb2.Tensor(dtype=99, shape=[1], data=b"\0\0"), "dtype is 99"),  # type: ignore[arg-type]
        (predictor_pb2.Tensor(dtype=model_pb2.DTYPE_BFLOAT16, shape=[2], data=b"\0\0"), "has 2 bytes"),
        (predictor_pb2.Tensor(dtype=model_pb2.DTYPE_FLOAT32, shape=[2**31, 2**31], data=b""), "has 0 bytes"),
    ],
)
def test_damaged_tensors_are_refused(message: predictor_pb2.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hint_wire.decode_tensor(message)


def test_steps_and_ends_come_back() -> None:
    start = StepStart(7, (StepSpan("a", 12, True), StepSpan("b", 1, False)))
    assert hint_wire.decode_step_start(hint_wire.encode_step_start(start)) == start
    ended = RequestsEnded(("a", "b"))
    assert hint_wire.decode_requests_ended(hint_wire.encode_requests_ended(ended)) == ended


def test_a_span_without_a_phase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"span\.phase is 0"):
        hint_wire.decode_step_start(predictor_pb2.StepStart(spans=[predictor_pb2.StepSpan(num_tokens=1)]))


@given(
    rows=st.lists(st.integers(0, 2**32 - 1), max_size=6),
    width=st.integers(1, 4),
    wants_hidden=st.booleans(),
    layers=st.lists(st.integers(0, 99), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_observations_come_back(rows: list[int], width: int, wants_hidden: bool, layers: list[int]) -> None:
    rng = np.random.default_rng(len(rows))
    hidden_RD = rng.standard_normal((len(rows), width)).astype(np.float32) if wants_hidden else None
    routings = tuple(
        LayerRouting(layer, rng.integers(0, 2**16, (len(rows), width)).astype(np.uint16), ready)
        for layer, ready in zip(layers, cycle([None, (), (0,), (7, 8, 300)]), strict=False)
    )
    observation = Observation(3, 5, tuple(rows), 99, hidden_RD, routings)
    decoded = hint_wire.decode_observation(hint_wire.encode_observation(observation, Dtype.FLOAT32))
    assert (decoded.step, decoded.layer, decoded.rows, decoded.num_tokens) == (3, 5, tuple(rows), 99)
    assert (decoded.hidden_RD is None) == (hidden_RD is None)
    if decoded.hidden_RD is not None and hidden_RD is not None:
        np.testing.assert_array_equal(decoded.hidden_RD, hidden_RD)
    assert [routing.layer for routing in decoded.routings] == layers
    for one, other in zip(decoded.routings, routings, strict=True):
        assert one.ready == other.ready
        if rows:
            np.testing.assert_array_equal(one.topk_ids_RK, other.topk_ids_RK)
        else:
            assert one.topk_ids_RK.size == 0


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            predictor_pb2.Observation(
                rows=[0, 1], hidden=hint_wire.encode_tensor(np.zeros((1, 3), np.float32), Dtype.FLOAT32)
            ),
            "observation.hidden has the shape",
        ),
        (
            predictor_pb2.Observation(
                rows=[0], hidden=hint_wire.encode_tensor(np.zeros((1, 3, 1), np.float32), Dtype.FLOAT32)
            ),
            "observation.hidden has the shape",
        ),
        (
            predictor_pb2.Observation(rows=[0, 1], routings=[predictor_pb2.LayerRouting(topk_ids=b"\0" * 6)]),
            "routing.topk_ids has 6 bytes",
        ),
        (
            predictor_pb2.Observation(routings=[predictor_pb2.LayerRouting(ready=bytes(8193))]),
            "routing.ready has 8193 bytes",
        ),
        (
            predictor_pb2.Observation(rows=[], routings=[predictor_pb2.LayerRouting(topk_ids=b"\0" * 6)]),
            "routing.topk_ids has 6 bytes",
        ),
    ],
)
def test_observations_of_other_rows_are_refused(message: predictor_pb2.Observation, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hint_wire.decode_observation(message)


def test_hints_come_back_even_when_they_are_nonsense() -> None:
    hint = Hint(4, 2, 3, 1, np.array([9, 9, 65535], np.uint16), np.array([0.5, np.nan, -1], np.float32), 2, "a@1")
    decoded = hint_wire.decode_hint(hint_wire.encode_hint(hint))
    assert (decoded.step, decoded.layer, decoded.observed_step, decoded.observed_layer) == (4, 2, 3, 1)
    assert (decoded.num_expected, decoded.version) == (2, "a@1")
    np.testing.assert_array_equal(decoded.experts, hint.experts)
    np.testing.assert_array_equal(decoded.scores, hint.scores)
    assert decoded.experts.dtype == hint.experts.dtype
    assert decoded.scores.dtype == hint.scores.dtype


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (predictor_pb2.Hint(experts=[1, 2], scores=[0.5]), "2 experts and 1 scores"),
        (predictor_pb2.Hint(experts=[65536], scores=[0.5]), "hint.experts has 65536"),
    ],
)
def test_hints_that_are_none_are_refused(message: predictor_pb2.Hint, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hint_wire.decode_hint(message)


@pytest.mark.parametrize("kind", list(ObservedKind))
def test_versions_come_back(kind: ObservedKind) -> None:
    version = PredictorVersion("gate_ahead@1", "gate_ahead", kind, (1, 2), True, False)
    assert hint_wire.decode_version(hint_wire.encode_version(version)) == version


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (predictor_pb2.PredictorVersion(version="a@1"), "version.observed is 0"),
        (predictor_pb2.PredictorVersion(observed=predictor_pb2.OBSERVED_KIND_NONE), "version.version is empty"),
    ],
)
def test_versions_that_say_nothing_are_refused(message: predictor_pb2.PredictorVersion, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        hint_wire.decode_version(message)
