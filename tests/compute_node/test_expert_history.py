"""What is remembered of experts' uses, and what is expected from it."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.expert_history import LEAST_PROBABILITY, ExpertHistory
from promoe.ids import ExpertId

NUM_LAYERS, NUM_EXPERTS = 3, 8


def history() -> ExpertHistory:
    return ExpertHistory(NUM_LAYERS, NUM_EXPERTS, experts_per_token=2)


def until_use_LE(known: ExpertHistory) -> np.ndarray:
    return np.array([[known.layers_until_visit(n) + m for m in known.layers_missed(n)] for n in range(NUM_LAYERS)])


def probability_LE(known: ExpertHistory) -> np.ndarray:
    probabilities = np.array([known.next_probabilities_of(layer) for layer in range(NUM_LAYERS)])
    for layer, expert in np.ndindex(probabilities.shape):
        assert known.next_probability_of(ExpertId(layer, expert)) == probabilities[layer, expert]
    return probabilities


routings = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=4, unique=True),
    ),
    max_size=40,
)


@given(routed=routings)
def test_probabilities_stay_probabilities(routed: list[tuple[int, list[int]]]) -> None:
    known = history()
    for step, (layer, experts) in enumerate(routed):
        known.begin_step(1 + step % 3, 1 + step % 2)
        known.routed(layer, experts, None, 1)
        assert (probability_LE(known) > 0).all()
        assert (probability_LE(known) <= 1).all()
        assert (until_use_LE(known) >= 1).all()


@given(routed=routings)
def test_recency_orders_experts_as_they_were_used(routed: list[tuple[int, list[int]]]) -> None:
    known = history()
    order: list[tuple[int, int]] = []
    for layer, experts in routed:
        known.routed(layer, experts, None, 1)
        for expert in experts:
            if (layer, expert) in order:
                order.remove((layer, expert))
            order.append((layer, expert))
    assert sorted(order, key=lambda place: known.uses.last_use[place[0]][place[1]]) == order


def test_what_is_used_often_is_expected_sooner_than_what_is_used_rarely() -> None:
    known = history()
    for step in range(20):
        known.routed(0, [0, 1 + step % 5], None, 1)
    until_use_E = until_use_LE(known)[0]
    assert until_use_E[0] < until_use_E[1] < until_use_E[7]


def test_the_nearer_layer_is_expected_sooner() -> None:
    known = history()
    known.begin_step(1, 1)
    known.routed(0, [0, 1], None, 1)
    for layer in (1, 2):
        known.hinted(layer, [4], [1.0])
    assert until_use_LE(known)[1, 4] == 1.0
    assert until_use_LE(known)[2, 4] == 2.0


def test_the_layer_that_was_just_visited_comes_a_whole_step_later() -> None:
    known = history()
    known.begin_step(1, 1)
    known.routed(1, [3], None, 1)
    known.hinted(1, [3], [1.0])
    assert until_use_LE(known)[1, 3] == NUM_LAYERS


@given(routed=routings, hinted=st.integers(0, NUM_LAYERS - 1))
def test_a_layer_counts_its_changes(routed: list[tuple[int, list[int]]], hinted: int) -> None:
    known = history()
    changes: list[Callable[[], None]] = [
        *(lambda layer=layer, experts=experts: known.routed(layer, experts, None, 1) for layer, experts in routed),
        lambda: known.hinted(hinted, [1, 2], [0.9, 0.4]),
        lambda: known.begin_step(7, 1),
        lambda: known.begin_step(1, 1),
        known.reset,
    ]
    for change in changes:
        before, missed = list(known.changes), [list(known.layers_missed(layer)) for layer in range(NUM_LAYERS)]
        change()
        for layer in range(NUM_LAYERS):
            assert known.changes[layer] > before[layer] or list(known.layers_missed(layer)) == missed[layer]


def test_a_hint_replaces_the_own_estimate_until_the_layer_is_routed() -> None:
    known = history()
    before = probability_LE(known)[1]
    known.hinted(1, [6], [0.9])
    assert probability_LE(known)[1, 6] == pytest.approx(0.9)
    assert (probability_LE(known)[1, :6] < before[:6]).all(), "what the hint does not list is less likely"
    known.hinted(1, [2], [0.5])
    assert probability_LE(known)[1, 6] < before[6], "the newer hint stands alone"
    known.routed(1, [0, 1], None, 1)
    assert probability_LE(known)[1, 2] == probability_LE(known)[1, 6]


def test_scores_beyond_probabilities_are_taken_as_certain() -> None:
    known = history()
    known.hinted(0, [1, 2], [7.0, -3.0])
    assert probability_LE(known)[0, 1] == 1.0
    assert probability_LE(known)[0, 2] == pytest.approx(LEAST_PROBABILITY)


def test_more_tokens_need_more_experts() -> None:
    known = history()
    alone = probability_LE(known)
    known.begin_step(num_tokens=50, num_requests=1)
    assert (probability_LE(known) > alone).all()
    assert (probability_LE(known) > 0.99).all(), "a prefill needs nearly everything"
    share_E = [2 / NUM_EXPERTS] * NUM_EXPERTS
    known.routed(0, list(range(NUM_EXPERTS)), share_E, 50)
    assert (probability_LE(known)[0] < 0.5).all(), "the next visit is one token's again"


def test_many_tokens_at_once_teach_as_much_as_one_by_one() -> None:
    at_once, one_by_one = history(), history()
    share_E = [1.0 if expert in (2, 3) else 0.0 for expert in range(NUM_EXPERTS)]
    at_once.routed(0, [2, 3], share_E, 30)
    for _ in range(30):
        one_by_one.routed(0, [2, 3], None, 1)
    assert probability_LE(at_once)[0] == pytest.approx(probability_LE(one_by_one)[0])


def test_what_was_loaded_ahead_is_not_the_first_to_go() -> None:
    known = history()
    known.routed(0, [1, 2], None, 1)
    known.loaded(ExpertId(0, 5), is_needed=False)
    uses = known.uses
    assert uses.last_use[0][5] > max(uses.last_use[0][1:3])
    assert uses.num_uses[0][5] == 0
    known.loaded(ExpertId(0, 6), is_needed=True)
    assert uses.num_uses[0][6] == 1


def test_being_hinted_touches_the_best_last() -> None:
    known = history()
    known.routed(0, [1, 2, 3], None, 1)
    known.touched(0, [3, 1])
    last_touch = known.uses.last_touch[0]
    assert last_touch[3] > last_touch[1] > last_touch[2]
    assert known.uses.last_use[0][3] < last_touch[3]


def test_the_version_changes_with_the_estimates() -> None:
    known = history()
    versions = [known.version]
    known.begin_step(1, 1)
    versions.append(known.version)
    known.routed(0, [1], None, 1)
    versions.append(known.version)
    known.hinted(1, [1], [0.5])
    versions.append(known.version)
    known.reset()
    versions.append(known.version)
    assert sorted(set(versions)) == versions


@given(routed=routings)
def test_a_history_survives_its_json(routed: list[tuple[int, list[int]]]) -> None:
    known, copy = history(), history()
    for layer, experts in routed:
        known.routed(layer, experts, None, 1)
    copy.load_json(known.to_json())
    for each in (known, copy):
        each.begin_step(1, 1)
        each.routed(0, [3], None, 1)
    assert copy.to_json() == known.to_json()


def test_the_history_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        ExpertHistory(2, 4, 1).load_json(history().to_json())


def test_the_history_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="another version of promoe: it lacks"):
        history().load_json('{"clock_ticks": 3}')
