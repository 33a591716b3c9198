"""What the learner decides, and that a human's change is the human's."""

from dataclasses import replace

import pytest

from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.course import (
    Course,
    Decision,
    LearnerState,
    LetLookOn,
    LookAway,
    Promote,
    TakeBack,
    Train,
)
from predictor_service.shadow.tally import StepComparison
from promoe.predictor_versions import VersionMetric

CONFIG = LearnerConfig(
    train_after_tokens=100, train_after_documents=3, least_steps=1, most_steps=1, max_stretches=60, watch_stretches=40
)


def compared(active: str, shadow: str, gain: float) -> StepComparison:
    return StepComparison(("r1",), active, shadow, 0.5, 0.5 + gain)


def until_decided(course: Course, active: str, shadow: str, gain: float, most: int = 100) -> list[Decision]:
    for _ in range(most):
        decisions = course.compared(compared(active, shadow, gain))
        if decisions:
            return list(decisions)
    return []


def shadowing(config: LearnerConfig = CONFIG) -> Course:
    course = Course(config)
    assert list(course.gathered(3, 100)) == [Train()]
    (decision,) = course.trained("a@1.1", "a@1", (VersionMetric("recall", 0.8),))
    assert isinstance(decision, LetLookOn)
    assert (decision.version, decision.numbers) == ("a@1.1", (VersionMetric("recall", 0.8),))
    assert course.state is LearnerState.SHADOWING
    return course


def watching() -> Course:
    course = shadowing()
    (decision,) = until_decided(course, "a@1", "a@1.1", 0.05)
    assert isinstance(decision, Promote)
    assert (decision.version, decision.former) == ("a@1.1", "a@1")
    numbers = {number.name: number.value for number in decision.numbers}
    assert numbers["gain"] == pytest.approx(0.05)
    assert numbers["evidence"] >= numbers["evidence_needed"] == 100
    assert course.state is LearnerState.WATCHING
    return course


def test_training_waits_for_enough_that_is_new() -> None:
    course = Course(CONFIG)
    assert not course.gathered(2, 500)
    assert not course.gathered(3, 99)
    assert course.gathered(3, 100)
    assert not course.gathered(9, 900), "one at a time"
    course.failed()
    assert not course.gathered(9, 199)
    assert course.gathered(9, 200)


def test_somebody_may_ask_before() -> None:
    course = Course(CONFIG)
    assert course.ask()
    assert list(course.gathered(1, 2)) == [Train()]
    assert not course.ask(), "a candidate is on its way"


def test_what_is_better_is_promoted_and_proves_itself() -> None:
    course = watching()
    (decision,) = until_decided(course, "a@1.1", "a@1", -0.05)
    assert isinstance(decision, LookAway)
    assert decision.version == "a@1"
    assert course.state is LearnerState.GATHERING


def test_what_is_worse_after_all_is_taken_back() -> None:
    course = watching()
    first, second = until_decided(course, "a@1.1", "a@1", 0.05)
    assert isinstance(first, TakeBack)
    assert first.version == "a@1.1"
    assert isinstance(second, LookAway)
    assert second.version == "a@1"
    assert course.state is LearnerState.GATHERING


@pytest.mark.parametrize("gain", [-0.05, 0.0, 0.001])
def test_what_is_not_shown_to_be_better_is_not_promoted(gain: float) -> None:
    course = shadowing()
    (decision,) = until_decided(course, "a@1", "a@1.1", gain)
    assert isinstance(decision, LookAway)
    assert (decision.version, course.state) == ("a@1.1", LearnerState.GATHERING)


def test_other_pairs_are_nobody_s_evidence() -> None:
    course = shadowing()
    for _ in range(100):
        assert not course.compared(compared("b@1", "a@1.1", 0.5))
        assert not course.compared(compared("a@1", "b@1", 0.5))
    assert course.state is LearnerState.SHADOWING


def test_a_human_s_activation_ends_the_trial_and_a_human_s_shadow_stays() -> None:
    course = shadowing()
    assert not course.changed("a@1", "a@1.1"), "as it should be"
    (decision,) = course.changed("b@7", "a@1.1")
    assert isinstance(decision, LookAway)
    assert "Somebody activated b@7" in decision.why
    assert course.state is LearnerState.GATHERING
    assert not shadowing().changed("a@1", "mine@3")
    assert not shadowing().changed("b@7", None)


def test_what_comes_too_late_is_left_out() -> None:
    course = Course(CONFIG)
    assert not course.trained("a@1.1", "a@1", ())
    assert not course.compared(compared("a@1", "a@1.1", 0.5))
    assert not course.changed("a@1", None)
    assert course.progress == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_after_tokens", 0),
        ("max_train_s", 0.0),
        ("half_life_s", float("inf")),
        ("held_out_share", 1.0),
        ("error_rate", 0.0),
        ("least_gain", 0.2),
        ("least_steps", 1000),
    ],
)
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"learner.{name} is {value}"):
        replace(LearnerConfig(), **{name: value})
