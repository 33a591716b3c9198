"""Delays grow, honour the server and never outlive the deadline."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.errors import DeadlineExceeded, InvalidInput, ModelNotFound, Overloaded, PromoeError, Unavailable
from promoe.retry import Attempts, RetryPolicy


@given(
    max_attempts=st.integers(1, 8),
    retry_after_ms=st.integers(0, 20_000),
    deadline_s=st.floats(0.5, 1000),
)
def test_tries_are_bounded_and_delays_stay_in_their_range(
    max_attempts: int, retry_after_ms: int, deadline_s: float
) -> None:
    policy = RetryPolicy(max_attempts, first_delay_s=0.2, max_delay_s=1.0)
    attempts = Attempts(policy, deadline_s)
    error = Overloaded("Full.", retry_after_ms)
    num_delays = 0
    with suppress(Overloaded):
        while num_delays < max_attempts:
            delay_s = attempts.delay_after(error)
            num_delays += 1
            assert max(0.2, retry_after_ms / 1000) <= delay_s <= 1.25 * max(1.0, retry_after_ms / 1000)
            assert delay_s < deadline_s
    assert num_delays < max_attempts


def test_delays_double_up_to_the_longest() -> None:
    attempts = Attempts(RetryPolicy(max_attempts=10, first_delay_s=1.0, max_delay_s=4.0), deadline_s=100)
    delays = [attempts.delay_after(Unavailable("Away.")) for _ in range(5)]
    for delay_s, least_s in zip(delays, (1, 2, 4, 4, 4), strict=True):
        assert least_s <= delay_s <= 1.25 * least_s


@pytest.mark.parametrize("error", [InvalidInput("No."), ModelNotFound("No."), DeadlineExceeded("Late.")])
def test_what_time_does_not_mend_is_raised_at_once(error: PromoeError) -> None:
    with pytest.raises(type(error)):
        Attempts(RetryPolicy(), 100).delay_after(error)


def test_a_passed_deadline_is_an_error() -> None:
    attempts = Attempts(RetryPolicy(), 1e-9)
    with pytest.raises(DeadlineExceeded):
        _ = attempts.remaining_s


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="max_attempts is 0"):
        RetryPolicy(max_attempts=0)
    with pytest.raises(ValueError, match="deadline_s is nan"):
        Attempts(RetryPolicy(), float("nan"))
