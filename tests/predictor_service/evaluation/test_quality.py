"""A predictor's quality is counted right: known hints on known routing, and what is not measured stays out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service.evaluation.quality import Evaluation, PredictorQuality, play
from predictor_service.predictors.frequency import VERSION
from promoe.hint import Hint, Observation, PredictorVersion, StepStart
from promoe.trace_events import LayerEvent, StepEvent
from promoe.trace_file import TraceReader
from tests.predictor_service.made_up_traces import EXPERTS, LAYERS, PER_TOKEN, LearnableModel

DOCUMENTS, DECODED = 4, 9


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> TraceReader:
    return TraceReader(LearnableModel().write_trace(tmp_path_factory.mktemp("traces") / "a.trace", DOCUMENTS))


class Knowing:
    """Knows the routing of each step and layer; `right` of its first k are right, at these probabilities.

    The second half of the truth, if it is not among the first k, comes right behind them.
    """

    def __init__(self, trace: TraceReader, right: int, score: float = 1.0, lookahead: int = 2) -> None:
        self._routing: dict[tuple[int, int], list[int]] = {}
        self._last_step = 0
        for event in trace.events(hidden=False):
            if isinstance(event, LayerEvent):
                self._routing[event.step, event.layer] = event.topk_ids_TK[0].tolist()
                self._last_step = event.step
        self._right, self._score, self._lookahead = right, score, lookahead
        self.ended: list[str] = []

    @property
    def version(self) -> PredictorVersion:
        return replace(VERSION, lookaheads=(self._lookahead,))

    def open_session(self) -> "Knowing":
        return self

    def begin_step(self, start: StepStart) -> None:
        assert start.num_tokens >= 1

    def end_requests(self, request_ids: Sequence[str]) -> None:
        self.ended += request_ids

    def observe(self, observation: Observation) -> Sequence[Hint]:
        steps, layer = divmod(observation.layer + self._lookahead, LAYERS)
        step = observation.step + steps
        if step > self._last_step:
            return ()
        truth = self._routing[step, layer]
        wrong = [expert for expert in range(EXPERTS) if expert not in truth]
        ranked = [*truth[: self._right], *wrong[: PER_TOKEN - self._right], *truth[self._right :]]
        scores = np.full(len(ranked), self._score, np.float32)
        return [
            Hint(
                step, layer, observation.step, observation.layer, np.array(ranked, np.uint16), scores, PER_TOKEN, "k@1"
            )
        ]


def quality_of(predictor: Knowing, trace: TraceReader) -> PredictorQuality:
    evaluation = Evaluation(predictor)
    play(trace, [evaluation])
    return evaluation.quality()


@pytest.mark.parametrize(("right", "recall", "wide"), [(2, 1.0, 1.0), (1, 0.5, 1.0), (0, 0.0, 0.5)])
def test_recall_is_the_share_that_was_found(trace: TraceReader, right: int, recall: float, wide: float) -> None:
    quality = quality_of(Knowing(trace, right), trace)
    for row in quality.lookaheads:
        assert row.recall == pytest.approx(recall)
        assert row.recall_wide == pytest.approx(wide)


def test_every_decoded_token_is_measured_and_no_prompt(trace: TraceReader) -> None:
    same, following = quality_of(Knowing(trace, 2), trace).lookaheads
    assert (same.lookahead, same.is_next_step) == (2, False)
    assert (following.lookahead, following.is_next_step) == (2, True)
    assert same.hints == DOCUMENTS * DECODED * (LAYERS - 2)
    assert following.hints == DOCUMENTS * DECODED * 2


@pytest.mark.parametrize(("right", "score", "error"), [(2, 1.0, 0.0), (2, 0.75, 0.25), (0, 0.5, 0.0)])
def test_the_calibration_error_is_how_far_scores_are_from_shares(
    trace: TraceReader, right: int, score: float, error: float
) -> None:
    for row in quality_of(Knowing(trace, right, score), trace).lookaheads:
        assert row.calibration_error == pytest.approx(error, abs=1e-6)
        assert row.mean_score_sum == pytest.approx(score * (PER_TOKEN + PER_TOKEN - right))


def test_only_the_asked_documents_are_measured(trace: TraceReader) -> None:
    evaluation = Evaluation(Knowing(trace, 2), lambda request_id: request_id == "r1")
    play(trace, [evaluation])
    assert sum(row.hints for row in evaluation.quality().lookaheads) == DECODED * LAYERS


def test_requests_that_ended_are_told(trace: TraceReader) -> None:
    knowing = Knowing(trace, 2)
    quality_of(knowing, trace)
    assert knowing.ended == [f"r{document}" for document in range(DOCUMENTS - 1)]


def test_time_is_measured_in_decode_steps(trace: TraceReader) -> None:
    quality = quality_of(Knowing(trace, 2), trace)
    num_steps = sum(isinstance(event, StepEvent) for event in trace)
    assert quality.observations == num_steps * LAYERS
    assert 0 < quality.median_observe_s <= quality.p99_observe_s


def test_several_are_played_to_at_once_as_alone(trace: TraceReader) -> None:
    knowings = [Knowing(trace, right) for right in (2, 0)]
    evaluations = [Evaluation(knowing) for knowing in knowings]
    play(trace, evaluations)
    for evaluation, right in zip(evaluations, (2, 0), strict=True):
        assert evaluation.quality().lookaheads == quality_of(Knowing(trace, right), trace).lookaheads


def test_nothing_played_is_nothing(tmp_path: Path, trace: TraceReader) -> None:
    quality = Evaluation(Knowing(trace, 2)).quality()
    assert quality.lookaheads == ()
    assert quality.observations == 0
