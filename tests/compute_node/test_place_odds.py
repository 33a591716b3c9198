"""Of an order probabilities are made: by how often the expert at each place was routed lately."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.place_odds import HEAD_PRIOR, MOST_KEYS, TAIL_PRIOR, OddsKey, PlaceOdds
from promoe.hint import Hint

KEY = OddsKey("order@1", 2)


def ranked(experts: list[int], num_expected: int = 2) -> Hint:
    """With scores that are logits."""
    scores = np.linspace(7.0, -7.0, len(experts)).astype(np.float32)
    return Hint(1, 2, 1, 0, np.array(experts, np.uint16), scores, num_expected, KEY.version)


def scores_of(odds: PlaceOdds, hint: Hint, key: OddsKey = KEY) -> list[float]:
    calibrated = odds.calibrated(key, hint)
    assert calibrated.experts is hint.experts, "the order stays"
    return [float(score) for score in calibrated.scores]


def test_before_there_is_evidence_the_head_is_likely_and_the_rest_is_not() -> None:
    assert scores_of(PlaceOdds(), ranked([3, 1, 2])) == pytest.approx([HEAD_PRIOR, HEAD_PRIOR, TAIL_PRIOR])


def test_places_come_to_be_worth_what_they_were() -> None:
    odds = PlaceOdds()
    for number in range(1000):
        hint = ranked([3, 1, 2, 0])
        odds.calibrated(KEY, hint)
        odds.note(KEY, hint, {3, 1} if number % 2 else {3, 2})
    assert scores_of(odds, ranked([7, 6, 5, 4])) == pytest.approx([1.0, 0.5, 0.5, 0.0], abs=0.02)
    other = OddsKey(KEY.version, 3)
    assert scores_of(odds, ranked([7, 6, 5, 4]), other)[0] == pytest.approx(HEAD_PRIOR), "each lookahead has its own"


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=8, unique=True), st.integers(0, 8), st.sets(st.integers(0, 9))),
        max_size=30,
    )
)
def test_whatever_comes_they_are_probabilities_that_never_rise(
    told: list[tuple[list[int], int, set[int]]],
) -> None:
    odds = PlaceOdds()
    for experts, num_expected, routed in told:
        hint = ranked(experts, num_expected)
        scores = scores_of(odds, hint)
        assert len(scores) == len(experts)
        assert all(0.0 <= score <= 1.0 for score in scores)
        assert scores == sorted(scores, reverse=True)
        odds.note(KEY, hint, routed)


def test_nothing_is_kept_of_versions_without_end_or_of_those_that_nobody_asks_about() -> None:
    odds = PlaceOdds()
    odds.note(KEY, ranked([1]), {1})
    assert not odds._shares
    for number in range(3 * MOST_KEYS):
        odds.calibrated(OddsKey(f"order@{number}", 1), ranked([1]))
    assert len(odds._shares) == MOST_KEYS
