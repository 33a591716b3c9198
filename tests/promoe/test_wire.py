"""Nouns survive the wire; peers of another schema or model are refused with both sides in the text."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.errors import ModelMismatch
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout
from promoe.schema import OUR_SCHEMA, Schema
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION, check_schema, decode_expert, encode_expert, encode_spec
from tests.promoe.specs import LAYOUTS, small_spec

UINT32 = st.integers(0, (1 << 32) - 1)


@given(st.builds(ExpertId, UINT32, UINT32))
def test_an_expert_survives_the_wire(expert: ExpertId) -> None:
    message = model_pb2.ExpertId.FromString(encode_expert(expert).SerializeToString())
    assert decode_expert(message) == expert


def test_a_spec_says_on_the_wire_what_it_says_here() -> None:
    spec = small_spec()
    message = model_pb2.ModelSpec.FromString(encode_spec(spec).SerializeToString())
    for field in message.DESCRIPTOR.fields:
        if field.name not in ("dtype", "expert_nbytes"):
            assert getattr(message, field.name) == getattr(spec, field.name), field.name
    assert message.dtype == model_pb2.DTYPE_BFLOAT16
    assert message.expert_nbytes == spec.layout.blob_nbytes


def test_no_field_of_a_spec_is_left_out() -> None:
    assert {field.name for field, _ in encode_spec(small_spec()).ListFields()} == set(
        model_pb2.ModelSpec.DESCRIPTOR.fields_by_name
    )


@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_dtype_has_a_name_on_the_wire(dtype: Dtype) -> None:
    spec = small_spec()
    message = encode_spec(replace(spec, layout=replace(spec.layout, dtype=dtype)))
    assert model_pb2.Dtype.Name(message.dtype) == f"DTYPE_{dtype.name}"


@given(LAYOUTS.filter(lambda layout: layout.blob_nbytes > 0))
def test_the_blobs_size_is_that_of_the_layout(layout: ExpertLayout) -> None:
    assert encode_spec(replace(small_spec(), layout=layout)).expert_nbytes == layout.blob_nbytes


def test_a_minor_apart_works_both_ways_and_the_older_one_is_spoken() -> None:
    major, minor = OUR_SCHEMA
    for theirs, spoken in ((minor - 1, minor - 1), (minor, minor), (minor + 1, minor)):
        peer = model_pb2.ServiceInfo(version="0.9.0", schema_version=f"{major}.{theirs}")
        assert check_schema(peer, "The store") == (major, spoken)


FURTHER_APART = (f"{OUR_SCHEMA.major}.{OUR_SCHEMA.minor + 2}", f"{OUR_SCHEMA.major + 1}.{OUR_SCHEMA.minor}", "99.0")
NO_VERSION = ("", "one", "1", "1.", ".1", "1.0.0", "1.-1", " 1.0", "1.\u0661", "1." + "9" * 5000)


@pytest.mark.parametrize("theirs", [*FURTHER_APART, *NO_VERSION])
def test_a_peer_of_another_schema_is_refused_with_both_sides(theirs: str) -> None:
    with pytest.raises(ModelMismatch) as caught:
        check_schema(model_pb2.ServiceInfo(schema_version=theirs), "The store at unix:a.sock")
    for part in ("The store at unix:a.sock", f"schema {theirs or 'unknown'}", f"speaks {SCHEMA_VERSION}"):
        assert part in str(caught.value)


@given(st.builds(Schema, UINT32, UINT32))
def test_a_schema_is_read_as_it_is_written(schema: Schema) -> None:
    parsed = Schema.parse(str(schema))
    assert parsed == (schema if max(schema) < 10**9 else None)


@given(st.builds(Schema, st.integers(0, 3), st.integers(0, 5)), st.builds(Schema, st.integers(0, 3), st.integers(0, 5)))
def test_who_speaks_with_whom_is_mutual(one: Schema, other: Schema) -> None:
    assert one.speaks_with(other) is other.speaks_with(one)
