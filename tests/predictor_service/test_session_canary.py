"""A canary predicts its own requests' tokens, as if they had been alone, and the active version the others'."""

from collections.abc import Sequence

import numpy as np
import pytest

from predictor_service.lineup import Canary, Lineup
from predictor_service.predictor import PredictorSession
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.session import MOST_ANNOUNCED, Session
from promoe.hint import Hint, LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from tests.predictor_service.layer_events import make_spec, source_of
from tests.predictor_service.test_versions import NamedPredictor

SPEC = make_spec(layers=3, experts=8, per_token=2, hidden=4)


class Attentive(NamedPredictor):
    """Remembers what it was shown."""

    def __init__(self, version: str, observed: ObservedKind = ObservedKind.NONE) -> None:
        super().__init__(version, observed)
        self.starts: list[StepStart] = []
        self.observations: list[Observation] = []
        self.ended: list[str] = []

    def begin_step(self, start: StepStart) -> None:
        self.starts.append(start)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        self.observations.append(observation)
        return super().observe(observation)

    def end_requests(self, request_ids: Sequence[str]) -> None:
        self.ended += request_ids


def requests(canary: Canary, num: int) -> tuple[list[str], list[str]]:
    """So many that the canary takes, and so many that it leaves."""
    drawn = [f"r{number}" for number in range(1000)]
    return [r for r in drawn if canary.takes(r)][:num], [r for r in drawn if not canary.takes(r)][:num]


def observation(step: int, num_tokens: int, hidden: bool = False) -> Observation:
    ids_RK = np.array([[row % 8, (row + 1) % 8] for row in range(num_tokens)], np.uint16)
    hidden_RD = np.zeros((num_tokens, SPEC.hidden_size), np.float32) if hidden else None
    return Observation(step, 0, tuple(range(num_tokens)), num_tokens, hidden_RD, (LayerRouting(0, ids_RK),))


def decode(step: int, *request_ids: str) -> StepStart:
    return StepStart(step, tuple(StepSpan(request_id, 1, is_prefill=False) for request_id in request_ids))


def test_each_request_is_predicted_by_one_of_them() -> None:
    active, tried = Attentive("a@1"), Attentive("c@1")
    canary = Canary(tried, 0.3)
    lineup = Lineup(active, canary)
    session = Session("node", SPEC, lambda: lineup, max_rows=4)
    (mine, *_), (other, another) = requests(canary, 2)
    assert session.announced_canary == tried.version
    session.begin_step(decode(1, other, mine, another))
    hints = session.observe(observation(1, 3))
    assert [hint.version for hint in hints] == ["a@1", "c@1"]
    assert [span.request_id for span in active.starts[0].spans] == [other, another]
    assert [span.request_id for span in tried.starts[0].spans] == [mine]
    assert active.observations[0].routings[0].topk_ids_RK.tolist() == [[0, 1], [2, 3]]
    assert tried.observations[0].routings[0].topk_ids_RK.tolist() == [[1, 2]]
    assert (active.observations[0].num_tokens, tried.observations[0].num_tokens) == (2, 1)
    session.begin_step(decode(2, other))
    assert [hint.version for hint in session.observe(observation(2, 1))] == ["a@1"]
    assert len(tried.starts) == 1, "a step without its requests is not the canary's"
    session.end_requests([mine, other])
    assert active.ended == tried.ended == [mine, other]
    assert session.counters.costs["a@1"].observations == 2
    assert session.counters.costs["c@1"].observations == 1
    assert (session.counters.observations, session.counters.hints) == (2, 3)


def test_what_a_node_does_not_show_yet_is_not_predicted_from() -> None:
    active, tried = Attentive("a@1"), Attentive("c@1", ObservedKind.ROUTER_INPUT)
    canary = Canary(tried, 0.5)
    lineups = [Lineup(active)]
    session = Session("node", SPEC, lambda: lineups[-1], max_rows=4)
    (mine, *_), _ = requests(canary, 1)
    session.begin_step(StepStart(1, decode(1, mine).spans, version="a@1"))
    lineups.append(Lineup(active, canary))
    announced = session.begin_step(StepStart(2, decode(2, mine).spans, version="a@1"))
    assert announced is not None
    assert (announced.version, announced.observed) == ("a@1", ObservedKind.ROUTER_INPUT)
    session.begin_step(StepStart(3, decode(3, mine).spans, version="a@1"))
    assert session.observe(observation(3, 1)) == []
    assert [hint.version for hint in session.observe(observation(3, 1, hidden=True))] == ["c@1"]


def test_what_the_active_version_remembers_stays_when_a_canary_comes_and_goes() -> None:
    frequency, tried = FrequencyPredictor(source_of(SPEC)), Attentive("c@1")
    lineups = [Lineup(frequency)]
    session = Session("node", SPEC, lambda: lineups[-1], max_rows=4)
    canary = Canary(tried, 0.5)
    _, (other, *_) = requests(canary, 1)

    def hinted(step: int) -> list[int]:
        session.begin_step(decode(step, other))
        (hint, *_) = session.observe(observation(step, 1))
        experts: list[int] = hint.experts.tolist()
        return experts[:2]

    for step in range(1, 5):
        hinted(step)
    for step, lineup in enumerate([Lineup(frequency, canary), Lineup(frequency)], 5):
        lineups.append(lineup)
        hinted(2 * step)
        kept = session._active
        assert hinted(2 * step + 1), "the version that was active goes on"
        assert session._active is kept
    assert session.announced_canary is None


def test_the_active_version_s_cost_is_told_after_many_canaries() -> None:
    active = Attentive("a@1")
    lineups = [Lineup(active, Canary(Attentive(f"c@{number}"), 0.5)) for number in range(2 * MOST_ANNOUNCED)]
    session = Session("node", SPEC, lambda: lineups[0], max_rows=4)
    (mine, *_), (other, *_) = requests(Canary(active, 0.5), 1)
    former_s = 0.0
    for step in range(1, 2 * MOST_ANNOUNCED):
        del lineups[:1]
        session.begin_step(decode(step, mine, other))
        session.observe(observation(step, 2))
        assert session.counters.predict_s > former_s, "a total never falls"
        former_s = session.counters.predict_s
    assert session.counters.costs["a@1"].observations == 2 * MOST_ANNOUNCED - 1
    assert len(session.counters.costs) <= MOST_ANNOUNCED + 1


class Mindful(Attentive):
    """Knows whose requests it saw, and what it was told by another."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.known: set[str] = set()
        self.told: list[set[str]] = []

    def begin_step(self, start: StepStart) -> None:
        super().begin_step(start)
        self.known |= {span.request_id for span in start.spans}

    def adopt(self, former: PredictorSession) -> None:
        assert isinstance(former, Mindful)
        self.told.append(set(former.known))


@pytest.mark.parametrize("becomes_active", [True, False])
def test_when_a_canary_is_over_who_goes_on_is_told_of_the_other_s_requests(becomes_active: bool) -> None:
    active, tried = Mindful("a@1"), Mindful("c@1")
    canary = Canary(tried, 0.5)
    lineup = Lineup(active, canary)
    session = Session("node", SPEC, lambda: lineup, max_rows=4)
    (mine, *_), (other, *_) = requests(canary, 1)
    session.begin_step(decode(1, mine, other))
    lineup = Lineup(tried if becomes_active else active)
    session.begin_step(decode(2, mine, other))
    session.begin_step(decode(3, mine, other))
    assert (tried.told if becomes_active else active.told) == [{other} if becomes_active else {mine}]
    assert session._active.predictor is (tried if becomes_active else active)
    assert session._canary is None
