"""Which hints a replay gets, and when."""

import pytest

from compute_node.replay.hint_plan import HintSettings, HintSource, Observed, plan_hints
from tests.compute_node.replay.virtual_runs import TracedSimulation, made_up, what_if
from tests.promoe.traces import MadeUpRun

RUN = made_up(MadeUpRun(num_layers=4, num_requests=2, decode_steps=5))


@pytest.mark.parametrize("lookahead", [1, 3, 6])
def test_the_oracle_knows_the_routing_so_many_layers_ahead(lookahead: int) -> None:
    plan = plan_hints(RUN, HintSettings(HintSource.ORACLE, lookahead, 0.25))
    turns = [(step.start.step, turn) for step in RUN.steps for turn in step.layers]
    assert len(plan) == len(turns) - lookahead
    for place, (step, turn) in enumerate(turns[:-lookahead]):
        (planned,) = plan[Observed(step, turn.event.layer)]
        target_step, target = turns[place + lookahead]
        assert (planned.hint.step, planned.hint.layer) == (target_step, target.event.layer)
        assert tuple(planned.hint.experts.tolist()) == target.needed
        assert planned.delay_s == 0.25


def test_the_oracle_does_not_see_over_a_gap() -> None:
    steps = (*RUN.steps[:2], *RUN.steps[3:])
    plan = plan_hints(type(RUN)(RUN.header, RUN.geometry, steps), HintSettings(HintSource.ORACLE, 1))
    assert Observed(RUN.steps[1].start.step, 3) not in plan
    assert Observed(RUN.steps[1].start.step, 2) in plan


def test_no_predictor_gives_no_hints() -> None:
    assert not plan_hints(RUN, HintSettings(HintSource.NONE))


@pytest.mark.parametrize("latency_s", [0.0, 0.0011, 0.004])
def test_recorded_hints_come_as_long_after_their_observation_as_in_the_run(latency_s: float) -> None:
    asked = HintSettings(HintSource.ORACLE, 2, latency_s)
    recorded = TracedSimulation(RUN, what_if("promoe", 4, asked)).recorded()
    plan = plan_hints(recorded, HintSettings())
    assert len(plan) > 20
    delays_s = [planned.delay_s for hints in plan.values() for planned in hints]
    assert delays_s == pytest.approx([latency_s] * len(delays_s), abs=1e-9)


def test_another_latency_can_be_asked_for() -> None:
    recorded = TracedSimulation(RUN, what_if("promoe", 4)).recorded()
    plan = plan_hints(recorded, HintSettings(latency_s=0.5))
    assert {planned.delay_s for hints in plan.values() for planned in hints} == {0.5}


@pytest.mark.parametrize(("lookahead", "latency_s"), [(0, None), (2, -1.0)])
def test_settings_without_a_meaning_are_refused(lookahead: int, latency_s: float | None) -> None:
    with pytest.raises(ValueError, match="allowed"):
        HintSettings(HintSource.ORACLE, lookahead, latency_s)
