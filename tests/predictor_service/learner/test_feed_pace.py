"""A reader rests as long as the socket holds what comes meanwhile, and no longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.feed_pace import LONGEST_REST_S, FeedPace

BUFFER_NBYTES = 425984
"""What a socket has where nobody raised `wmem_max`, as the system says it."""

READING_S = 1e-4


def most_waiting(pace: FeedPace, bytes_per_s: float, begin_s: float, turns: int) -> float:
    """Of a steady stream; a turn reads all that waits."""
    now_s, waiting, most = begin_s, 0.0, 0.0
    for _ in range(turns):
        rest_s = pace.rest_s(int(waiting), now_s)
        now_s += rest_s + READING_S
        waiting = bytes_per_s * (rest_s + READING_S)
        most = max(most, waiting)
    return most


@given(st.floats(1e3, 64e6), st.floats(0.0, 3600.0))
def test_what_comes_meanwhile_fits(bytes_per_s: float, idle_s: float) -> None:
    pace = FeedPace(BUFFER_NBYTES, 0.0)
    assert most_waiting(pace, bytes_per_s, 0.0, 3000) <= BUFFER_NBYTES / 4
    assert most_waiting(pace, bytes_per_s, 100.0 + idle_s, 300) <= BUFFER_NBYTES / 4, (
        "after hours in which nothing came"
    )


def test_where_little_comes_it_is_seldom_woken() -> None:
    pace = FeedPace(BUFFER_NBYTES, 0.0)
    first = pace.rest_s(1000, 0.02)
    assert first < 0.001, "nothing is known yet"
    now_s = 0.02
    for _ in range(10_000):
        now_s += 0.02
        rest_s = pace.rest_s(20_000, now_s)
    assert rest_s == LONGEST_REST_S


def test_a_burst_is_remembered_for_a_while() -> None:
    pace = FeedPace(BUFFER_NBYTES, 0.0)
    for turn in range(10_000):
        pace.rest_s(1000, 0.02 * turn)
    after = pace.rest_s(400_000, 200.0 + 0.02)
    assert after == pytest.approx(BUFFER_NBYTES / 8 / (400_000 / 0.04), rel=0.01)
    assert pace.rest_s(0, 200.04) == pytest.approx(after, rel=0.01)
