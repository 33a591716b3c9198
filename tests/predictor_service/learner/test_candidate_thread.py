"""What trains gives way to whoever serves."""

import os
import queue
from pathlib import Path

import pytest

from predictor_service.learner.candidate_thread import CandidateThread
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
