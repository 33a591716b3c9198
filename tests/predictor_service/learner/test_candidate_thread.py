"""What trains gives way to whoever serves."""

import os
import queue
from pathlib import Path

import pytest

from predictor_service.learner import candidate_thread
from predictor_service.learner.candidate_thread import CandidateProgress, CandidateThread
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import CandidateTrained, Train, TrainingFailed
from tests.predictor_service.made_up_traces import learnable_spec

_DEADLINE_S = 60.0


@pytest.mark.parametrize(("niceness", "policy"), [(19, os.SCHED_IDLE), (18, os.SCHED_OTHER), (0, os.SCHED_OTHER)])
def test_the_nicest_trains_in_the_idle_class_and_nobody_else_does(niceness: int, policy: int, tmp_path: Path) -> None:
    told: queue.SimpleQueue[tuple[CandidateTrained | TrainingFailed, int]] = queue.SimpleQueue()
    thread = CandidateThread(
        LearnerConfig(niceness=niceness),
        learnable_spec(),
        tmp_path,
        tmp_path,
        lambda result: told.put((result, os.sched_getscheduler(0))),
    )
    thread.start(Train(None, "learned@1"), [])
    result, policy_of_thread = told.get(timeout=_DEADLINE_S)
    assert isinstance(result, TrainingFailed), "there is nothing to learn from"
    assert policy_of_thread == policy
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "the thread that listens stays as it was"


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
