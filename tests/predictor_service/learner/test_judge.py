"""The test's error rates are what is stated, however often one looks, and its bound holds."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.judge import Judge, JudgeSettings, Verdict, log_growth, log_wealth

SETTINGS = JudgeSettings(min_gain=0.01, alpha=0.05, give_up_alpha=0.1, largest_difference=0.25, max_documents=300)
STREAMS = 2000

Differences = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def even(mean: float, spread: float) -> Differences:
    return lambda rng, shape: rng.uniform(mean - spread, mean + spread, shape)


def rare_jumps(mean: float) -> Differences:
    """Mostly a little more than the mean, now and then far below it: what fools a t test."""
    return lambda rng, shape: np.where(rng.random(shape) < 0.03, mean - 0.194, mean + 0.006)


def all_or_nothing(mean: float) -> Differences:
    return lambda rng, shape: np.where(rng.random(shape) < 0.5 + 2 * mean, 0.25, -0.25)


def share_ever_above(differences_SN: np.ndarray, mean: float, alpha: float) -> float:
    """Of streams whose wealth ever reached 1/alpha."""
    largest = SETTINGS.largest_difference
    wealth = [log_wealth(log_growth(differences_N, mean, largest)).max() for differences_N in differences_SN]
    return float(np.mean(np.array(wealth) >= -math.log(alpha)))


@pytest.mark.parametrize("differences", [even(0.01, 0.05), even(0.01, 0.2), rare_jumps(0.01), all_or_nothing(0.01)])
def test_what_is_no_better_is_promoted_at_most_as_often_as_stated(differences: Differences) -> None:
    drawn_SN = differences(np.random.default_rng(0), (STREAMS, SETTINGS.max_documents))
    assert abs(drawn_SN.mean() - SETTINGS.min_gain) < 0.002, "the border of the claim, where it is hardest"
    assert share_ever_above(drawn_SN, SETTINGS.min_gain, SETTINGS.alpha) <= SETTINGS.alpha


@pytest.mark.parametrize("differences", [even(0.01, 0.05), rare_jumps(0.01), all_or_nothing(0.01)])
def test_what_is_better_is_given_up_at_most_as_often_as_stated(differences: Differences) -> None:
    drawn_SN = -differences(np.random.default_rng(1), (STREAMS, SETTINGS.max_documents))
    assert share_ever_above(drawn_SN, -SETTINGS.min_gain, SETTINGS.give_up_alpha) <= SETTINGS.give_up_alpha


@pytest.mark.parametrize(("gain", "within"), [(0.03, 220), (0.06, 70), (0.15, 25)])
def test_a_real_gain_is_seen_in_time(gain: float, within: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        judge = Judge(replace(SETTINGS, alpha=0.01))
        while judge.add(float(np.clip(rng.normal(gain, 0.04), -1, 1))) is Verdict.OPEN:
            pass
        assert judge.verdict is Verdict.BETTER
        assert judge.judgement().documents <= within


def test_a_real_loss_is_seen_sooner_than_undecided() -> None:
    judge = Judge(SETTINGS)
    while judge.add(-0.05) is Verdict.OPEN:
        pass
    judgement = judge.judgement()
    assert judgement.verdict is Verdict.NOT_BETTER
    assert judgement.documents < 30
    assert judgement.give_up_e_value >= 1 / SETTINGS.give_up_alpha


def test_what_is_the_same_is_undecided_after_as_many_documents_as_there_may_be() -> None:
    judge = Judge(replace(SETTINGS, max_documents=50))
    for number in range(60):
        judge.add(SETTINGS.min_gain + (0.01 if number % 2 else -0.01))
    assert judge.judgement().verdict is Verdict.UNDECIDED
    assert judge.judgement().documents == 50


def test_the_bound_is_below_the_true_gain() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        judge = Judge(replace(SETTINGS, min_gain=0.2, give_up_alpha=1e-9))
        for difference in rng.uniform(-0.02, 0.12, 60):
            judge.add(float(difference))
        bound = judge.judgement().gain_at_least
        covered += bound < 0.05
        assert bound > -0.05, "60 documents say something"
    assert covered >= 95


def test_nothing_seen_is_nothing_known() -> None:
    judgement = Judge(SETTINGS).judgement()
    assert judgement.verdict is Verdict.OPEN
    assert (judgement.documents, judgement.gain, judgement.e_value) == (0, 0.0, 1.0)
    assert judgement.gain_at_least == -SETTINGS.largest_difference


@given(st.lists(st.floats(-1, 1), max_size=60))
def test_it_agrees_with_the_plain_product(differences: list[float]) -> None:
    judge = Judge(SETTINGS)
    for difference in differences:
        judge.add(difference)
    judgement, taken = judge.judgement(), differences[: judge.judgement().documents]
    wealth = dict.fromkeys((0.06, 0.12, 0.25, 0.5, 0.95), 1.0)
    for difference in taken:
        cut = max(-0.25, min(0.25, difference))
        for share in wealth:
            wealth[share] *= 1 + share * (cut - 0.01) / 0.26
    assert judgement.e_value == pytest.approx(sum(wealth.values()) / 5, rel=1e-9)
    assert all(math.isfinite(value) for value in judgement.numbers().values())
    assert judgement.gain_at_least <= max(0.25, judgement.gain)
    if judgement.verdict is Verdict.BETTER:
        assert judgement.gain_at_least >= SETTINGS.min_gain - 1e-9


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=40), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2))
def test_a_larger_claim_is_harder_to_speak_against(differences: list[float], one: float, other: float) -> None:
    wealth = [log_wealth(log_growth(np.array(differences), mean, 0.25))[-1] for mean in sorted((one, other))]
    assert wealth[0] >= wealth[1] - 1e-9


def test_a_verdict_stays() -> None:
    judge = Judge(SETTINGS)
    while judge.add(0.25) is Verdict.OPEN:
        pass
    before = judge.judgement()
    for _ in range(100):
        assert judge.add(-0.25) is Verdict.BETTER
    assert judge.judgement() == before
