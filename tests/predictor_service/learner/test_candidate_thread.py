"""What trains gives way to whoever serves."""

import queue
from pathlib import Path

import pytest

from predictor_service.learner import candidate_thread
from predictor_service.learner.candidate_thread import CandidateProgress, CandidateThread
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import CandidateTrained, Train, TrainingFailed
from tests.predictor_service.made_up_traces import learnable_spec

_DEADLINE_S = 60.0


def test_who_has_nothing_to_learn_from_says_so(tmp_path: Path) -> None:
    told: queue.SimpleQueue[CandidateTrained | TrainingFailed] = queue.SimpleQueue()
    thread = CandidateThread(LearnerConfig(), learnable_spec(), tmp_path, tmp_path, told.put)
    thread.start(Train(None, "learned@1"), [])
    result = told.get(timeout=_DEADLINE_S)
    assert isinstance(result, TrainingFailed)
    assert "No documents" in result.sentence
    assert not thread.is_training


class PlayedTime:
    """Takes the place of `time`: a thread that computes for as long as it is told to, and sleeps a bit longer."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.used_s = 0.0
        self.slept_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def thread_time(self) -> float:
        return self.used_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-6
        self.slept_s += seconds

    def compute(self, seconds: float) -> None:
        self.now_s += seconds
        self.used_s += seconds


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> PlayedTime:
    played = PlayedTime()
    monkeypatch.setattr(candidate_thread, "time", played)
    return played


def test_it_takes_its_share_and_less_while_something_is_served(played: PlayedTime) -> None:
    progress = CandidateProgress(cpu_share=0.5, serving_cpu_share=0.1)
    for _ in range(10):
        progress.shown()
        played.compute(0.01)
        progress.advance(1, 8)
    assert played.slept_s == pytest.approx(0.1 * 9, rel=0.01)
    played.sleep(5.0)
    played.slept_s = 0.0
    for _ in range(10):
        played.compute(0.01)
        progress.advance(1, 8)
    assert played.slept_s == pytest.approx(0.1, rel=0.01)
    assert progress.num_tokens == 160


def test_a_long_rest_is_over_soon_after_the_last_request(played: PlayedTime) -> None:
    progress = CandidateProgress(cpu_share=0.5, serving_cpu_share=0.1)
    played.compute(0.8)  # as measuring on held-out documents does
    progress.advance(1, 8)
    # Nothing was shown since the beginning: served for the first second, then idle.
    assert played.slept_s == pytest.approx(0.8, abs=0.11)


def test_with_a_whole_core_it_does_not_rest(played: PlayedTime) -> None:
    progress = CandidateProgress(cpu_share=1.0, serving_cpu_share=1.0)
    played.compute(3.0)
    progress.advance(1, 8)
    assert played.slept_s == 0.0
