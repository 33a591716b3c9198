"""What the learner may do to the versions, and what is a person's and stays."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from predictor_service import learners_stage
from predictor_service.artifact import ArtifactManifest, write_artifact
from predictor_service.learner.stage import SERVED_TRAFFIC, SOURCE_KEY
from predictor_service.learners_stage import LearnersStage
from predictor_service.registry import Registry
from promoe.errors import ResourceExhausted
from promoe.predictor_versions import VersionAction
from tests.predictor_service.test_artifact import MANIFEST, TENSORS
from tests.predictor_service.test_stage import ANN, Service

LEARNED = replace(MANIFEST, training={SOURCE_KEY: SERVED_TRAFFIC})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path)
    yield running
    running.stage.close()


@pytest.fixture
def learners(service: Service, tmp_path: Path) -> LearnersStage:
    return LearnersStage(service.stage, Registry(tmp_path / "registry"), lambda _: None)


def test_somebody_else_s_shadow_stays(service: Service, learners: LearnersStage) -> None:
    service.stage.set_shadow("frequency", ANN)
    with pytest.raises(ResourceExhausted, match="frequency@1 looks on already, for somebody else"):
        learners.set_shadow("none@1", "the learner", "", {})
    learners.clear_shadow("the learner", "", {})
    assert service.versions.shadow is not None
    assert service.versions.shadow.version.version == "frequency@1"


def test_one_of_its_own_gives_way_until_it_is_somebody_else_s(service: Service, learners: LearnersStage) -> None:
    learners.set_shadow("frequency@1", "the learner", "", {})
    learners.set_shadow("none@1", "the learner", "", {})
    assert service.versions.shadow is not None
    assert service.versions.shadow.version.version == "none@1"
    learners.leave_shadow()
    with pytest.raises(ResourceExhausted):
        learners.set_shadow("frequency@1", "the learner", "", {})
    learners.clear_shadow("the learner", "", {})
    assert service.versions.shadow is not None


def test_it_rolls_back_to_what_it_compared_with(service: Service, learners: LearnersStage) -> None:
    service.stage.activate("frequency", ANN)
    learners.set_shadow("transition@1", "the learner", "", {})
    learners.rollback("the learner", "it loses", {}, "frequency@1")
    assert learners.active() == "transition@1"
    assert service.versions.log.changes()[-1].action is VersionAction.ROLLBACK
    # A person was there and is gone again: what was active last is not what was compared.
    learners.set_shadow("frequency@1", "the learner", "", {})
    service.stage.activate("none", ANN)
    service.stage.activate("transition", ANN)
    learners.rollback("the learner", "it loses", {}, "transition@1")
    assert learners.active() == "frequency@1"


def test_candidates_do_not_fill_the_registry(
    learners: LearnersStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learners_stage, "KEPT_CANDIDATES", 2)
    registry = Registry(tmp_path / "registry")
    registry.publish(artifact(tmp_path, replace(MANIFEST, version="1")))
    for number in range(1, 5):
        assert learners.publish(str(artifact(tmp_path, replace(LEARNED, version=f"1.{number}")))) == f"a@1.{number}"
    assert [entry.name.version for entry in registry.entries()] == ["1", "1.3", "1.4"], "a person's is left alone"


def artifact(folder: Path, manifest: ArtifactManifest) -> Path:
    path = folder / f"{manifest.version}.safetensors"
    write_artifact(path, manifest, TENSORS)
    return path


def test_what_cannot_be_published_is_told_as_such(learners: LearnersStage, tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("in the way")
    with pytest.raises(ResourceExhausted, match="cannot be published"):
        learners.publish(str(artifact(tmp_path, LEARNED)))
