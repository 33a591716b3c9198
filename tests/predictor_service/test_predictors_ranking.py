"""From probabilities of tokens to a hint of a layer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from predictor_service.predictors.ranking import MIN_PROBABILITY, HintTarget, Ranking, target_of, union
from promoe.hint import Float32Array, Observation
from tests.predictor_service.layer_events import make_spec

PROBABILITIES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(0, 1, width=32)
)


@given(PROBABILITIES)
def test_the_union_of_all_tokens_is_what_the_loop_says(probability_RE: Float32Array) -> None:
    needed_E = union(probability_RE, len(probability_RE))
    for expert in range(probability_RE.shape[1]):
        spared = 1.0
        for row in probability_RE:
            spared *= 1 - float(row[expert])
        assert needed_E[expert] == pytest.approx(1 - spared, abs=1e-5)


@given(PROBABILITIES, st.integers(0, 20))
def test_unseen_tokens_only_add(probability_RE: Float32Array, num_unseen: int) -> None:
    num_rows = len(probability_RE)
    seen_E, all_E = union(probability_RE, num_rows), union(probability_RE, num_rows + num_unseen)
    assert (all_E >= seen_E - 1e-6).all()
    assert (all_E >= probability_RE.max(axis=0) - 1e-5).all()
    assert (all_E <= 1).all()


def test_a_sample_of_equal_tokens_stands_for_all() -> None:
    one_RE = np.array([[0.5, 0.25]], np.float32)
    assert union(one_RE, 3) == pytest.approx([1 - 0.5**3, 1 - 0.75**3])
    assert union(np.repeat(one_RE, 2, axis=0), 6) == pytest.approx([1 - 0.5**6, 1 - 0.75**6])


@pytest.mark.parametrize(
    ("layer", "lookahead", "target"),
    [(0, 2, HintTarget(7, 2)), (3, 2, HintTarget(7, 5)), (4, 2, HintTarget(8, 0)), (5, 6, HintTarget(8, 5))],
)
def test_behind_the_last_layer_comes_the_next_step(layer: int, lookahead: int, target: HintTarget) -> None:
    assert target_of(Observation(7, layer, (), 1), lookahead, 6) == target


def test_a_hint_is_ranked_cut_and_says_how_many_are_expected() -> None:
    ranking = Ranking(make_spec(experts=6, per_token=2), "x@1")
    needed_E = np.array([0.1, 0.9, MIN_PROBABILITY / 2, 0.5, 0.0, 0.2], np.float32)
    hint = ranking.hint(Observation(3, 1, (0,), 1), HintTarget(3, 4), needed_E, 1)
    assert hint.experts.tolist() == [1, 3, 5, 0]
    assert hint.scores.tolist() == pytest.approx([0.9, 0.5, 0.2, 0.1])
    assert (hint.num_expected, hint.version) == (2, "x@1")
    assert (hint.step, hint.layer, hint.observed_step, hint.observed_layer) == (3, 4, 3, 1)


@pytest.mark.parametrize(("needed", "num_tokens", "num_expected"), [(0.5, 4, 3), (0.0, 4, 2), (1.0, 2, 4), (1.0, 9, 6)])
def test_a_batch_expects_as_many_as_are_probable(needed: float, num_tokens: int, num_expected: int) -> None:
    ranking = Ranking(make_spec(experts=6, per_token=2), "x@1")
    hint = ranking.hint(
        Observation(1, 0, (0,), num_tokens), HintTarget(1, 1), np.full(6, needed, np.float32), num_tokens
    )
    assert hint.num_expected == num_expected
    assert len(hint.experts) >= num_expected
