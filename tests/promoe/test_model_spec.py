"""The layout of one expert's blob: nothing overlaps, everything is aligned, sizes add up."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.model_spec import BLOB_ALIGNMENT_NBYTES, TENSOR_ALIGNMENT_NBYTES, Dtype, ExpertLayout, align_up
from tests.promoe.specs import LAYOUTS, small_spec


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
def test_align_up_is_the_smallest_multiple_that_holds_it(nbytes: int, alignment_nbytes: int) -> None:
    aligned = align_up(nbytes, alignment_nbytes)
    assert aligned % alignment_nbytes == 0
    assert nbytes <= aligned < nbytes + alignment_nbytes


@given(LAYOUTS)
def test_tensors_are_aligned_and_do_not_overlap(layout: ExpertLayout) -> None:
    assert layout.tensors[0].offset == 0
    assert all(tensor.offset % TENSOR_ALIGNMENT_NBYTES == 0 for tensor in layout.tensors)
    for before, after in itertools.pairwise(layout.tensors):
        gap_nbytes = after.offset - (before.offset + before.nbytes)
        assert 0 <= gap_nbytes < TENSOR_ALIGNMENT_NBYTES


@given(LAYOUTS)
def test_sizes_are_those_of_the_elements(layout: ExpertLayout) -> None:
    for tensor in layout.tensors:
        assert tensor.nbytes == math.prod(tensor.shape) * layout.dtype.itemsize
    assert sum(tensor.nbytes for tensor in layout.tensors) <= layout.blob_nbytes <= layout.blob_stride_nbytes
    assert layout.blob_stride_nbytes % BLOB_ALIGNMENT_NBYTES == 0
    assert layout.blob_stride_nbytes - layout.blob_nbytes < BLOB_ALIGNMENT_NBYTES


@given(LAYOUTS)
def test_the_layout_follows_from_names_and_shapes_alone(layout: ExpertLayout) -> None:
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    assert ExpertLayout.of(layout.dtype, shapes) == layout
    assert [tensor.name for tensor in layout.tensors] == list(shapes)


def test_an_expert_without_tensors_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="at least one tensor"):
        ExpertLayout.of(Dtype.FLOAT32, {})


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_dtypes_are_spelled_like_torchs(dtype: str, itemsize: int) -> None:
    assert Dtype.parse(dtype).value == dtype
    assert Dtype.parse(dtype).itemsize == itemsize


def test_an_unknown_dtype_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"'int4'; allowed: float32, float16, bfloat16"):
        Dtype.parse("int4")


def test_a_models_experts_are_counted_over_all_layers() -> None:
    spec = small_spec(num_moe_layers=4, num_experts=6)
    assert spec.num_blobs == 24
    # gate_up 10 x 8 and down 8 x 5 in bfloat16, the second at the next cache line: 192 + 80.
    assert spec.layout.blob_nbytes == 272
    assert spec.experts_nbytes == 24 * 272
