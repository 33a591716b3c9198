"""Every step is in one stretch, and requests that follow each other are not mixed for nothing."""

from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.stretch import Stretches, StretchSettings
from predictor_service.shadow.tally import StepComparison


def step(requests: str, gain: float = 0.0) -> StepComparison:
    return StepComparison(tuple(requests), "a@1", "s@1", 0.5, 0.5 + gain)


def ends(steps: list[StepComparison], least: int = 2, most: int = 5) -> list[float]:
    stretches = Stretches(StretchSettings(least, most))
    return [round(gain, 9) for each in steps if (gain := stretches.add(each)) is not None]


def test_a_request_is_a_stretch() -> None:
    assert ends([step("a", 0.1)] * 3 + [step("b", 0.3)] * 4 + [step("c")]) == [0.1, 0.3]


def test_short_requests_are_judged_together() -> None:
    assert ends([step("a", 0.1), step("b", 0.3), step("c"), step("c")]) == [0.2]


def test_a_long_request_is_judged_more_than_once() -> None:
    assert ends([step("a", 0.1)] * 11) == [0.1, 0.1]


def test_of_a_busy_node_a_stretch_lasts_as_long_as_its_first_requests() -> None:
    assert ends([step("ab", 0.1), step("bc", 0.1), step("bd", 0.1), step("cd", 0.5)]) == [0.1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-0.5, 0.5)), max_size=60))
def test_the_mean_of_all_steps_is_kept(steps: list[tuple[str, float]]) -> None:
    stretches = Stretches(StretchSettings(3, 7))
    totals: list[float] = []
    lengths: list[int] = []
    length = 0
    for requests, gain in steps:
        ended = stretches.add(step(requests, gain))
        if ended is not None:
            totals.append(ended * length)
            lengths.append(length)
            length = 0
        length += 1
    assert all(3 <= length <= 7 for length in lengths)
    closed = sum(lengths)
    assert abs(sum(totals) - sum(gain for _, gain in steps[:closed])) < 1e-9
