"""The table of errors is one to one, and complete."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe import errors
from promoe.errors import (
    EXIT_PACK_DAMAGED,
    STATUS_OF_ERROR,
    InternalError,
    InvalidInput,
    ModelMismatch,
    Overloaded,
    PackDamaged,
    PromoeError,
    Unavailable,
    error_of,
    exit_status,
    status_of,
    wire_text,
)


def test_every_domain_error_is_in_the_table_once() -> None:
    defined = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, PromoeError) and kind is not PromoeError
    }
    assert sorted(row[0].__name__ for row in STATUS_OF_ERROR) == sorted(kind.__name__ for kind in defined)


def test_no_status_stands_for_two_errors() -> None:
    statuses = [status for _, status in STATUS_OF_ERROR]
    assert len(set(statuses)) == len(statuses)
    assert grpc.StatusCode.OK not in statuses


@pytest.mark.parametrize(("error_type", "status"), STATUS_OF_ERROR)
def test_the_table_goes_both_ways(error_type: type[PromoeError], status: grpc.StatusCode) -> None:
    assert status_of(error_type("Sentence.")) is status
    back = error_of(status, "Sentence.")
    assert type(back) is error_type
    assert str(back) == "Sentence."


@pytest.mark.parametrize("bug", [KeyError("x"), AssertionError("x"), RuntimeError("x"), PromoeError("x"), OSError("x")])
def test_what_is_not_in_the_table_is_a_bug(bug: Exception) -> None:
    assert status_of(bug) is None


def test_bad_values_are_bad_input() -> None:
    assert status_of(ValueError("x")) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("status", list(grpc.StatusCode))
def test_every_status_means_something_to_a_client(status: grpc.StatusCode) -> None:
    raised = error_of(status, "text of the peer")
    known = {known_status for _, known_status in STATUS_OF_ERROR}
    assert isinstance(raised, PromoeError)
    assert "text of the peer" in str(raised)
    if status not in known and status is not grpc.StatusCode.CANCELLED:
        assert type(raised) is InternalError
        assert status.name in str(raised)


def test_a_cancelled_call_may_be_tried_again() -> None:
    assert type(error_of(grpc.StatusCode.CANCELLED, "")) is Unavailable


@given(st.integers(0, 1 << 31))
def test_overload_keeps_its_delay(retry_after_ms: int) -> None:
    raised = error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, "The queue is full.", retry_after_ms)
    assert isinstance(raised, Overloaded)
    assert raised.retry_after_ms == retry_after_ms


def test_grpcs_own_uses_of_our_statuses_are_told_apart() -> None:
    too_large = "SERVER: Received message larger than max (33554438 vs. 33554432)"
    assert type(error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large)) is InvalidInput
    assert type(error_of(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")) is ModelMismatch


@given(st.text(st.characters(), max_size=6000))
def test_a_sentence_always_fits_the_wire(text: str) -> None:
    sent = wire_text(ValueError(text))
    encoded = sent.encode()  # valid UTF-8 even where the text held lone surrogates
    assert 0 < len(encoded) <= 2003
    kept = sent.removesuffix("…") if len(text.encode(errors="replace")) > 2000 else sent
    assert text.encode(errors="replace").decode().startswith(kept) or not text


def test_an_error_without_a_sentence_sends_its_name() -> None:
    assert wire_text(ValueError()) == "ValueError"


def test_only_a_damaged_pack_has_an_exit_status_of_its_own() -> None:
    assert exit_status(PackDamaged("L1E3 is damaged.")) == EXIT_PACK_DAMAGED
    others = [error_type for error_type, _ in STATUS_OF_ERROR if error_type is not PackDamaged]
    assert {exit_status(error_type("No.")) for error_type in others} == {1}
