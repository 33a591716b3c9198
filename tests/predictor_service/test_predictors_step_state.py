"""What a session remembers of the running step and of the one before."""

import numpy as np
import pytest

from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.step_state import StepState, multi_hot
from predictor_service.predictors.transition import VERSION
from promoe.hint import StepSpan, StepStart
from tests.predictor_service.layer_events import decode_start, make_spec, observed, prefill_start, source_of

IDS_RK = np.array([[1, 2]], np.uint16)


def test_routings_are_kept_for_one_step_and_the_next_one_of_the_same_requests() -> None:
    state = StepState()
    state.begin(decode_start(1))
    assert state.learn(observed(1, 0, IDS_RK)) == [0]
    assert state.learn(observed(1, 2, IDS_RK + 1)) == [2]
    assert set(state.routings) == {0, 2}
    assert state.former_routings == {}
    state.begin(decode_start(2))
    assert state.routings == {}
    assert state.former_routings[2].tolist() == [[2, 3]]
    state.begin(decode_start(3))
    assert state.former_routings == {}, "of the step before, not of an older one"


@pytest.mark.parametrize(
    "next_start", [decode_start(2, "r1", "r2"), decode_start(2, "r9"), prefill_start(2, 1), prefill_start(2, 5)]
)
def test_other_rows_do_not_continue_the_former_ones(next_start: StepStart) -> None:
    state = StepState()
    state.begin(decode_start(1))
    state.learn(observed(1, 0, IDS_RK))
    state.begin(next_start)
    assert state.former_routings == {}


def test_the_next_step_is_taken_to_decode_a_token_of_each_request() -> None:
    state = StepState()
    state.begin(StepStart(4, (StepSpan("a", 7, is_prefill=True), StepSpan("b", 1, is_prefill=False))))
    assert state.is_prefill
    assert (state.num_tokens_at(4), state.num_tokens_at(5)) == (8, 2)
    state.begin(decode_start(5))
    assert not state.is_prefill


def test_multi_hot_is_one_where_routed() -> None:
    hot_RE = multi_hot(np.array([[0, 3], [2, 1]], np.uint16), 4)
    assert hot_RE.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert multi_hot(np.empty((0, 2), np.uint16), 4).shape == (0, 4)


def test_a_version_is_named_after_a_lookahead_that_is_not_its_own() -> None:
    spec = make_spec(layers=6)
    assert at_lookahead(VERSION, source_of(spec)) is VERSION
    assert at_lookahead(VERSION, source_of(spec, lookahead=2)) is VERSION
    other = at_lookahead(VERSION, source_of(spec, lookahead=4))
    assert (other.version, other.lookaheads) == ("transition@1+l4", (4,))
    shallow = at_lookahead(VERSION, source_of(make_spec(layers=1)))
    assert shallow.lookaheads == (1,), "no further than there are layers"
