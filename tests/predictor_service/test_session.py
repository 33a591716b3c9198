"""A session checks what a node tells, times the plug-in, and is the edge at which a plug-in's bugs end."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest

from predictor_service.lineup import Lineup
from predictor_service.session import Session
from promoe.errors import InternalError, InvalidInput
from promoe.hint import Hint, LayerRouting, Observation, ObservedKind, PredictorVersion, StepSpan, StepStart
from tests.predictor_service.layer_events import decode_start, make_spec, observed

SPEC = make_spec(layers=3, experts=8, per_token=2, hidden=4)
IDS_RK = np.array([[1, 2]], np.uint16)


class RecordingPredictor:
    """Remembers what it is told; hints back what it saw; fails where it is told to."""

    def __init__(self, observed_kind: ObservedKind = ObservedKind.NONE, failure: Exception | None = None) -> None:
        self.version = PredictorVersion("recording@1", "recording", observed_kind, (1,), True, True)
        self.failure = failure
        self.told: list[object] = []

    def open_session(self) -> "RecordingPredictor":
        return self

    def begin_step(self, start: StepStart) -> None:
        self.told.append(start)

    def observe(self, observation: Observation) -> Sequence[Hint]:
        self.told.append(observation)
        if self.failure is not None:
            raise self.failure
        ids, scores = np.array([3], np.uint16), np.array([0.5], np.float32)
        return [Hint(observation.step, 1, observation.step, observation.layer, ids, scores, 1, "recording@1")]

    def end_requests(self, request_ids: Sequence[str]) -> None:
        self.told.append(tuple(request_ids))


def open_session(predictor: RecordingPredictor) -> Session:
    lineup = Lineup(predictor)
    return Session("node-1", SPEC, lambda: lineup, max_rows=2)


def test_events_reach_the_plugin_in_order_and_are_counted() -> None:
    predictor = RecordingPredictor()
    session = open_session(predictor)
    start, observation = decode_start(4), observed(4, 0, IDS_RK)
    session.begin_step(start)
    (hint,) = session.observe(observation)
    session.end_requests(("r1",))
    assert predictor.told == [start, observation, ("r1",)]
    assert hint.experts.tolist() == [3]
    counters = session.counters
    assert (counters.observations, counters.hints, counters.refused_observations) == (1, 1, 0)
    assert counters.predict_s > 0


def test_an_observation_of_a_step_that_is_over_or_unannounced_is_passed_over() -> None:
    predictor = RecordingPredictor()
    session = open_session(predictor)
    session.begin_step(decode_start(4))
    assert [*session.observe(observed(3, 0, IDS_RK)), *session.observe(observed(5, 0, IDS_RK))] == []
    assert session.counters.refused_observations == 2
    assert len(predictor.told) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hidden_states_that_are_no_numbers_are_passed_over(value: float) -> None:
    session = open_session(RecordingPredictor(ObservedKind.ROUTER_INPUT))
    session.begin_step(decode_start(1))
    hidden_RD = np.array([[1, 2, value, 4]], np.float32)
    assert list(session.observe(observed(1, 0, IDS_RK, hidden_RD))) == []
    assert session.counters.refused_observations == 1
    assert session.observe(observed(1, 1, IDS_RK, np.ones((1, 4), np.float32)))


def test_the_output_of_the_last_layer_is_an_observation_too() -> None:
    session = open_session(RecordingPredictor())
    session.begin_step(decode_start(1))
    assert session.observe(Observation(1, 3, (0,), 1))
    with pytest.raises(InvalidInput, match="MoE layer 4; made up has 3"):
        session.observe(Observation(1, 4, (0,), 1))


@pytest.mark.parametrize(
    ("observation", "sentence"),
    [
        (Observation(1, 0, (0, 1, 2), 9), r"3 rows \(0, 1\) of 9 tokens; allowed: 2 rows"),
        (Observation(1, 0, (0, 5), 5), "each a token of the step"),
        (Observation(1, 0, (1, 0), 5), "in their order"),
        (Observation(1, 0, (0, 0), 5), "in their order"),
        (Observation(1, 0, (0, 4), 5), "row 4; step 1 began with 1 tokens"),
        (Observation(1, 0, (0,), 1, np.ones((1, 5), np.float32)), r"shape \(1, 5\); expected \(1, 4\)"),
        (Observation(1, 0, (0,), 1, None, (LayerRouting(3, IDS_RK),)), "routing of MoE layer 3"),
        (Observation(1, 0, (0,), 1, None, (LayerRouting(0, IDS_RK + 6),)), "experts up to 8; made up has 3 MoE layers"),
        (Observation(1, 0, (0,), 1, None, (LayerRouting(0, IDS_RK[:, :1]),)), r"shape \(1, 1\); expected \(1, 2\)"),
        (Observation(1, 0, (0, 1), 2, None, (LayerRouting(0, IDS_RK),)), r"shape \(1, 2\); expected \(2, 2\)"),
    ],
)
def test_what_cannot_be_of_this_model_is_refused_with_a_sentence(observation: Observation, sentence: str) -> None:
    session = open_session(RecordingPredictor())
    session.begin_step(decode_start(1))
    with pytest.raises(InvalidInput, match=sentence):
        session.observe(observation)


def test_hidden_states_that_are_wanted_must_come() -> None:
    session = open_session(RecordingPredictor(ObservedKind.LAYER_INPUT))
    session.begin_step(decode_start(1))
    with pytest.raises(InvalidInput, match="lacks hidden states; recording@1 reads them"):
        session.observe(observed(1, 0, IDS_RK))


def test_no_rows_are_no_fault() -> None:
    session = open_session(RecordingPredictor())
    session.begin_step(decode_start(1))
    empty = Observation(1, 0, (), 5, None, (LayerRouting(0, np.empty((0, 0), np.uint16)),))
    assert session.observe(empty)


@pytest.mark.parametrize("step", [3, 2, 0])
def test_steps_count_up(step: int) -> None:
    session = open_session(RecordingPredictor())
    session.begin_step(decode_start(3))
    with pytest.raises(InvalidInput, match=f"Step {step} came after step 3"):
        session.begin_step(decode_start(step))


@pytest.mark.parametrize("failure", [KeyError("x"), ValueError("bad"), InvalidInput("Not the node's."), MemoryError()])
def test_a_plugin_s_bug_becomes_one_sentence_and_one_traceback(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(RecordingPredictor(failure=failure))
    spans = (StepSpan("job-17.0a", 1, is_prefill=False), StepSpan("made-up", 1, is_prefill=False))
    session.begin_step(StepStart(1, spans))
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError, match=rf"failed \({type(failure).__name__}\)"):
        session.observe(observed(1, 0, IDS_RK))
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "node-1" in record.getMessage()
    # The requests of the running step, by the names that callers and the node's log have for them.
    assert vars(record)["fields"] == {
        "node": "node-1", "step": 1, "request_ids": ["job-17"], "answer_ids": ["job-17.0a", "made-up"]
    }  # fmt: skip
    assert session.counters.observations == 0


def test_a_plugin_that_cannot_open_a_session_is_told_like_any_other_bug(caplog: pytest.LogCaptureFixture) -> None:
    class Closed(RecordingPredictor):
        def open_session(self) -> RecordingPredictor:
            raise ValueError("a bug of the plug-in")

    with caplog.at_level(logging.ERROR), pytest.raises(InternalError, match=r"recording@1 failed \(ValueError\)"):
        open_session(Closed())
    assert len(caplog.records) == 1
