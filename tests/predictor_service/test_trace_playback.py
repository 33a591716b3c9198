"""A played trace tells a session what the live node would have told, and hints are put where they could have come."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from predictor_service.predictors.frequency import VERSION as ROUTING_ONLY
from predictor_service.trace_hints import with_hints
from predictor_service.trace_playback import RecordedStep, observations, recorded_step, recorded_steps
from promoe.errors import InvalidInput
from promoe.hint import Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.trace_events import HintEvent, HintFate, LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader
from tests.predictor_service.made_up_traces import LAYERS, PER_TOKEN, LearnableModel

ROUTER_INPUT = replace(ROUTING_ONLY, observed=ObservedKind.ROUTER_INPUT)
LAYER_INPUT = replace(ROUTING_ONLY, observed=ObservedKind.LAYER_INPUT)


def steps_of(documents: int = 2) -> list[list[TraceEvent]]:
    events = list(LearnableModel().events(documents))
    starts = [index for index, event in enumerate(events) if isinstance(event, StepEvent)]
    return [events[first:last] for first, last in zip(starts, [*starts[1:], len(events)], strict=True)]


def step_of(events: Sequence[TraceEvent]) -> RecordedStep:
    step = recorded_step(events, LAYERS)
    assert step is not None
    return step


@pytest.mark.parametrize(
    ("version", "layers", "routed"),
    [
        (ROUTING_ONLY, list(range(LAYERS)), [[layer] for layer in range(LAYERS)]),
        (ROUTER_INPUT, list(range(LAYERS)), [[layer] for layer in range(LAYERS)]),
        (LAYER_INPUT, list(range(LAYERS + 1)), [[], *([layer] for layer in range(LAYERS))]),
        (replace(LAYER_INPUT, wants_routing=False), list(range(LAYERS + 1)), [[]] * (LAYERS + 1)),
    ],
)
def test_every_kind_comes_in_its_order(version: PredictorVersion, layers: list[int], routed: list[list[int]]) -> None:
    for events in steps_of():
        step = step_of(events)
        played = list(observations(step, version))
        assert [observation.layer for observation in played] == layers
        assert [[routing.layer for routing in observation.routings] for observation in played] == routed
        for observation in played:
            assert observation.rows == tuple(range(step.start.num_tokens))
            assert (observation.hidden_RD is None) == (version.observed is ObservedKind.NONE)
            for routing in observation.routings:
                np.testing.assert_array_equal(routing.topk_ids_RK, step.layers[routing.layer].topk_ids_TK)


@pytest.mark.parametrize("kind", [ROUTING_ONLY, ROUTER_INPUT, LAYER_INPUT])
@pytest.mark.parametrize("every", range(1, LAYERS + 2))
def test_layers_that_are_not_observed_leave_their_routing_to_the_next(kind: PredictorVersion, every: int) -> None:
    version = replace(kind, observe_every=every)
    observed = sorted({*range(0, LAYERS, every), LAYERS - 1})
    is_before = kind is LAYER_INPUT
    for events in steps_of():
        played = list(observations(step_of(events), version))
        assert [observation.layer for observation in played] == [*observed, *([LAYERS] if is_before else [])]
        known = [routing.layer for observation in played for routing in observation.routings]
        assert known == list(range(LAYERS)), "every layer's routing is told once"
        for observation in played:
            newest = observation.layer - 1 if is_before else observation.layer
            assert [routing.layer for routing in observation.routings][-1:] in ([newest], [])


def test_hidden_states_are_those_of_the_kind() -> None:
    step = step_of(steps_of()[1])
    for observation in observations(step, ROUTER_INPUT):
        np.testing.assert_array_equal(observation.hidden_RD, step.layers[observation.layer].router_input_RD)
    *inputs, last = observations(step, LAYER_INPUT)
    for observation in inputs:
        np.testing.assert_array_equal(observation.hidden_RD, step.layers[observation.layer].layer_input_RD)
    np.testing.assert_array_equal(last.hidden_RD, step.layers[-1].last_output_RD)


def test_a_trace_without_them_serves_those_who_want_routing_only(tmp_path: Path) -> None:
    path = LearnableModel().write_trace(tmp_path / "a.trace", 2)
    for step in recorded_steps(TraceReader(path), hidden=False):
        assert len(list(observations(step, ROUTING_ONLY))) == LAYERS
        with pytest.raises(InvalidInput, match="holds no router_input"):
            list(observations(step, ROUTER_INPUT))


def test_without_recorded_rows_the_last_tokens_stand_for_the_step() -> None:
    step = step_of(steps_of()[0])
    long = replace(step.layers[0], rows=(), topk_ids_TK=np.zeros((20, PER_TOKEN), np.uint16))
    spans = (replace(step.start.spans[0], num_tokens=20),)
    bare = replace(step, start=StepStart(1, spans), layers=(long,))
    (observation,) = observations(bare, ROUTING_ONLY)
    assert observation.rows == tuple(range(12, 20))
    assert observation.num_tokens == 20


def test_a_step_that_lacks_a_layer_is_none() -> None:
    assert recorded_step(steps_of()[0][:-1], LAYERS) is None


class EchoSession:
    """Hints every layer that it observes, for the same layer, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin_step(self, start: StepStart) -> None:
        self.told.append(f"step {start.step}")

    def observe(self, observation: Observation) -> Sequence[Hint]:
        layer, one = observation.layer, np.ones(1)
        return [
            Hint(
                observation.step,
                layer,
                observation.step,
                layer,
                one.astype(np.uint16),
                one.astype(np.float32),
                1,
                "e@1",
            )
        ]

    def end_requests(self, request_ids: Sequence[str]) -> None:
        self.told += [f"{request_id} ended" for request_id in request_ids]


@pytest.mark.parametrize("version", [ROUTER_INPUT, LAYER_INPUT])
def test_hints_stand_where_they_could_have_come(version: PredictorVersion) -> None:
    session = EchoSession()
    old = HintEvent(0.0, session.observe(Observation(1, 0, (0,), 1))[0], HintFate.TAKEN)
    for events in steps_of():
        written = list(with_hints([events[0], old, *events[1:]], session, version, LAYERS))
        assert [event for event in written if not isinstance(event, HintEvent)] == events
        for place, event in enumerate(written):
            if not isinstance(event, HintEvent) or event.hint.layer == LAYERS:
                continue
            neighbour = written[place + 1 if version is LAYER_INPUT else place - 1]
            assert isinstance(neighbour, LayerEvent)
            assert neighbour.layer == event.hint.layer
            assert (event.at_s < neighbour.at_s) == (version is LAYER_INPUT)
            assert event.latency_s == 0.0
        hinted = [event.hint.layer for event in written if isinstance(event, HintEvent)]
        assert hinted == list(range(LAYERS + (version is LAYER_INPUT)))
        times = [event.at_s for event in written]
        assert times == sorted(times)
    steps = [told for told, _ in groupby(session.told) if told.startswith("step")]
    assert steps == [f"step {number + 1}" for number in range(len(steps_of()))]
    assert "r0 ended" in session.told


def test_a_step_that_lacks_a_layer_keeps_its_events_and_gets_no_hints() -> None:
    session = EchoSession()
    events = steps_of()[0][:-1]
    assert list(with_hints(events, session, ROUTER_INPUT, LAYERS)) == events
    assert not session.told
