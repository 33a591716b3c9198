"""What the learner's thread makes of what happens beside it; the process it talks to is a double, or gone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from predictor_service.admin.service import PredictorAdminService
from predictor_service.artifact import write_artifact
from predictor_service.catalogue import Catalogue
from predictor_service.learner.conductor import Comparison, LearnerState
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import AskStatus, CandidateTrained, Command, LearnerStatus, Train
from predictor_service.learning import Learning, LearningSettings
from predictor_service.registry import Registry
from predictor_service.shadow.tally import ScoreReport, StepComparison
from promoe import predictor_versions
from promoe.errors import ModelNotFound, Unavailable
from promoe.v1 import predictor_admin_pb2 as pb
from tests.predictor_service.test_artifact import MANIFEST, TENSORS
from tests.predictor_service.test_stage import ANN, Service
from tests.running_store import wait_until

COMPARED = Comparison("transition@1", "frequency@1")
STATUS = LearnerStatus(0, 0, 0, 0, 0.0, 0, 0, False, False, 0, 0)


class SilentChild:
    """Takes commands down."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def send(self, command: Command) -> None:
        self.commands.append(command)


class LearningService(Service):
    """With a learner that is not started; `child` stands in for its process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.registry = Registry(folder / "registry")
        self.catalogue = Catalogue(self.spec, folder / "pack", self.registry)
        # Without settings its process ends at once: it lacks a pack.
        settings = LearningSettings(LearnerConfig(enabled=True), ())
        self.learning = Learning(settings, self.registry, self.stage, self.catalogue, self.feed)
        self.child = SilentChild()

    def with_child(self) -> Learning:
        self.learning._child = self.child  # type: ignore[assignment]
        return self.learning

    def comparing(self) -> Learning:
        conductor = self.learning._conductor
        conductor._compare(LearnerState.SHADOWING, COMPARED, conductor._promotion())
        return self.learning


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LearningService]:
    running = LearningService(tmp_path)
    yield running
    running.learning.close()
    running.stage.close()


def test_a_training_that_cannot_begin_leaves_it_gathering(service: LearningService) -> None:
    learning = service.learning
    learning.start()
    wait_until(lambda: "process ended" in learning.report().news, 30)
    with pytest.raises(Unavailable, match="is gone"):
        learning.train("ann", "now")
    assert learning._conductor.state is LearnerState.GATHERING, "the next one can begin"
    learning._conductor.gathered(1000, 1000)
    assert learning._conductor.state is LearnerState.GATHERING
    learning.close()
    with pytest.raises(Unavailable, match="has ended"):
        learning.pause(True, "ann")


def test_how_much_is_gathered_is_asked_however_much_else_happens(service: LearningService) -> None:
    learning = service.with_child()
    for _ in range(3):
        learning._ask_at_s = 0.0
        learning._hear(ScoreReport({}))
        learning._await_event()
    assert service.child.commands == [AskStatus()], "one question at a time"
    learning._take(service.child, STATUS)  # type: ignore[arg-type]
    learning._ask_at_s = 0.0
    learning._hear(ScoreReport({}))
    learning._await_event()
    assert service.child.commands == [AskStatus()] * 2


def test_a_candidate_that_comes_while_it_is_paused_is_kept_for_later(service: LearningService) -> None:
    learning = service.with_child()
    learning._conductor.train_now("ann", "now")
    (order,) = service.child.commands
    assert order == Train(None, "learned-here@1.1")
    learning._conductor.pause()
    path = Path(learning._candidates.name) / "learned-here@1.1.safetensors"
    write_artifact(path, replace(MANIFEST, name="learned-here", version="1.1"), TENSORS)
    learning._take(service.child, CandidateTrained(str(path), {}))  # type: ignore[arg-type]
    assert path.exists()
    learning._conductor.resume()
    assert [str(entry.name) for entry in service.registry.entries()] == ["learned-here@1.1"]
    learning._conductor.train_now("ann", "again")
    assert not path.exists(), "nobody waits for it any more"


def test_a_candidate_s_number_is_not_used_twice(service: LearningService) -> None:
    learning = service.learning
    assert learning._name_candidate("transition@1") == "learned-here@1.1"
    path = service.registry.folder.parent / "x.safetensors"
    write_artifact(path, replace(MANIFEST, name="learned-here", version="1.11"), TENSORS)
    entry = service.registry.publish(path)
    assert learning._name_candidate("transition@1") == "learned-here@1.12"
    service.registry.remove(entry.name)
    service.versions.log.add(predictor_versions.VersionAction.SHADOW, "a@1", "a@1", ANN, "learned-here@1.30")
    assert learning._name_candidate("transition@1") == "learned-here@1.31"


def test_while_a_person_tries_a_canary_nothing_is_decided(service: LearningService) -> None:
    learning = service.comparing()
    steps = tuple(StepComparison((f"r{n}",), COMPARED.active, COMPARED.shadow, 0.0, 1.0) for n in range(60))
    report = ScoreReport({}, steps, tuple(f"r{n}" for n in range(60)))
    service.stage.activate("frequency", ANN, canary_share=0.5)
    learning._take_report(report)
    assert learning._conductor.numbers()["documents"] == 0
    assert service.versions.canary is not None
    service.stage.rollback(ANN)
    learning._take_report(report)
    assert learning._conductor.state is not LearnerState.SHADOWING


def test_a_wish_that_cannot_be_had_does_not_end_what_the_learner_compares(service: LearningService) -> None:
    learning = service.comparing()
    learning.start()
    admin = PredictorAdminService(service.stage, service.catalogue, learning)
    context: grpc.ServicerContext = None  # type: ignore[assignment]  # it is not asked
    with pytest.raises(ModelNotFound):
        admin.SetShadow(pb.SetShadowRequest(version="no@1", who="ann"), context)
    assert learning._conductor.compared == COMPARED
    admin.SetShadow(pb.SetShadowRequest(version="frequency", who="ann"), context)
    assert learning._conductor.compared is None
