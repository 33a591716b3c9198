"""What is not better is promoted as rarely as was said, whenever one stops looking; what is better is seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.judge import Judge, JudgeSettings, Verdict

SETTINGS = JudgeSettings(least_gain=0.002, alpha=0.05, largest=0.1, most_stretches=150)


def judged(differences: "np.ndarray[tuple[int], np.dtype[np.float64]]", settings: JudgeSettings = SETTINGS) -> Judge:
    judge = Judge(settings)
    for difference in differences.tolist():
        if judge.see(difference) is not Verdict.OPEN:
            break
    return judge


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.normal(0.002, 0.03, 150),
        lambda rng: rng.normal(-0.01, 0.2, 150),
        # Rare large wins that many small losses pay for, and the other way round.
        lambda rng: np.where(rng.random(150) < 0.05, 0.1, 0.002 - 0.1 * 0.05 / 0.95),
        lambda rng: np.where(rng.random(150) < 0.05, -0.1, 0.002 + 0.1 * 0.05 / 0.95 - 0.0004),
    ],
)
def test_what_is_not_better_is_promoted_no_more_often_than_was_said(draw: object) -> None:
    assert callable(draw)
    rng = np.random.default_rng(7)
    verdicts = [judged(np.clip(draw(rng), -0.1, 0.1)).verdict for _ in range(400)]
    # 400 draws of a probability of at most 0.05: 35 or more come once in a thousand runs, and the seed is fixed.
    assert verdicts.count(Verdict.BETTER) < 35


def test_a_gain_is_seen_soon_and_a_loss_as_well() -> None:
    rng = np.random.default_rng(1)
    gains = [judged(rng.normal(0.03, 0.04, 150)) for _ in range(40)]
    assert sum(judge.verdict is Verdict.BETTER for judge in gains) >= 39
    assert np.median([judge.num_seen for judge in gains]) < 40
    losses = [judged(rng.normal(-0.03, 0.04, 150)) for _ in range(40)]
    assert all(judge.verdict is Verdict.NOT_BETTER for judge in losses)
    assert np.median([judge.num_seen for judge in losses]) < 60


def test_one_odd_document_decides_nothing() -> None:
    odd = np.full(150, -0.001)
    odd[10] = 1.0
    assert judged(odd).verdict is Verdict.NOT_BETTER


@given(st.lists(st.floats(-1, 1), max_size=200))
def test_a_verdict_is_final_and_the_figures_are_what_was_seen(differences: list[float]) -> None:
    judge = Judge(SETTINGS)
    verdicts = [judge.see(difference) for difference in differences]
    decided = next((n for n, verdict in enumerate(verdicts) if verdict is not Verdict.OPEN), None)
    if decided is not None:
        assert set(verdicts[decided:]) == {judge.verdict}
    assert judge.num_seen == (len(differences) if decided is None else decided + 1)
    assert judge.num_seen <= SETTINGS.most_stretches
    seen = differences[: judge.num_seen]
    assert judge.mean == pytest.approx(sum(seen) / len(seen) if seen else 0.0, abs=1e-9)
    assert judge.evidence >= 0.0


def test_without_a_verdict_in_time_it_is_not_better() -> None:
    judge = judged(np.full(200, 0.002))
    assert (judge.verdict, judge.num_seen) == (Verdict.NOT_BETTER, 150)
