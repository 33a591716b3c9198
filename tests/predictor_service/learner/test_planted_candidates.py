"""Candidates that are planted: bad ones are never promoted, a good one nearly always; over real predictors' hints."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service.artifact import ArtifactManifest, read_artifact, write_artifact
from predictor_service.learner.conductor import Conductor, LearnerState
from predictor_service.learner.config import LearnerConfig
from predictor_service.predictor import Predictor, PredictorSource
from predictor_service.predictors.learned import LearnedPredictor
from predictor_service.shadow.tally import StepComparison
from promoe.hint import Float32Array
from tests.predictor_service.in_memory_stage import InMemoryStage
from tests.predictor_service.learner_feed import made_up_steps
from tests.predictor_service.shadow_play import compared, scores
from tests.predictor_service.trained import small_training, train_small

SEEDS = 20
DOCUMENTS = 60
PLAYED = 6
CONFIG = LearnerConfig(max_documents=DOCUMENTS)

Tensors = dict[str, Float32Array]
Plant = Callable[[Tensors, np.random.Generator], Tensors]


def random_weights(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """As much as the real ones scatter."""
    return {
        name: rng.normal(values.mean(), values.std(), values.shape).astype(np.float32)
        for name, values in tensors.items()
    }


def inverted_scores(tensors: Tensors, _rng: np.random.Generator) -> Tensors:
    return tensors | {name: -tensors[name] for name in ("out.weight", "out.bias", "memory.weight")}


def worn(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """As if its text was another: right only roughly."""
    weight = tensors["out.weight"]
    return tensors | {"out.weight": weight + rng.normal(0, 0.8 * weight.std(), weight.shape).astype("f4")}


def trained_further(tensors: Tensors, rng: np.random.Generator) -> Tensors:
    """The good one: what it was trained to, all but unchanged."""
    return tensors | {"out.bias": tensors["out.bias"] + rng.normal(0, 1e-3, tensors["out.bias"].shape).astype("f4")}


class Planted:
    """A good version, an active one that is a worse copy of it, and what is planted."""

    def __init__(self, folder: Path) -> None:
        fit = replace(small_training("learned").fit, epochs=6)
        _, self.source = train_small("learned", folder / "good", fit=fit)
        assert self.source.artifact is not None
        self.good = read_artifact(self.source.artifact)
        self.folder = folder
        self.active = self.predictor(worn, 0)
        self.steps = made_up_steps(PLAYED, seed=5)
        self.active_scores = scores(self.steps, self.active)

    def predictor(self, plant: Plant, seed: int) -> Predictor:
        tensors = plant(dict(self.good.tensors), np.random.default_rng(seed))
        path = self.folder / f"{plant.__name__}-{seed}.safetensors"
        write_artifact(path, self._manifest(plant.__name__, seed), tensors)
        return LearnedPredictor(PredictorSource(self.source.spec, self.source.pack, path))

    def compared(self, candidate: Predictor) -> list[StepComparison]:
        return compared(self.steps, self.active_scores, scores(self.steps, candidate), self.active, candidate)

    def _manifest(self, name: str, seed: int) -> ArtifactManifest:
        return replace(self.good.manifest, name=name, version=str(seed))


class NoTraining:
    """Candidates are planted, not trained."""

    def train(self, base: str, name: str) -> None:
        assert base
        assert name


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


def decide(compared: Sequence[StepComparison], candidate: Predictor, seed: int) -> InMemoryStage:
    """Documents come in an order of the seed's, and some of them twice: another day of the same traffic."""
    version = candidate.version.version
    stage = InMemoryStage(compared[0].active_version)
    conductor = Conductor(CONFIG, stage, NoTraining(), lambda _: version)
    conductor.train_now("a test", "a candidate is planted")
    conductor.trained(f"/planted/{version}", {})
    names = sorted({step.request_ids[0] for step in compared})
    for number, name in enumerate(np.random.default_rng(seed).choice(names, DOCUMENTS)):
        for step in compared:
            if step.request_ids[0] == name:
                conductor.step_compared(replace(step, request_ids=(f"{number}:{name}",)))
        conductor.requests_ended((f"{number}:{name}",))
        if conductor.state in (LearnerState.GATHERING, LearnerState.WATCHING):
            break
    return stage


def promotions(planted: Planted, plant: Plant) -> int:
    count = 0
    for seed in range(SEEDS):
        candidate = planted.predictor(plant, seed)
        stage = decide(planted.compared(candidate), candidate, seed)
        count += stage.active() == candidate.version.version
        assert stage.decisions[-1].numbers["documents"] > 0
    return count


@pytest.mark.parametrize("plant", [random_weights, inverted_scores])
def test_a_bad_candidate_is_never_promoted(planted: Planted, plant: Plant) -> None:
    assert promotions(planted, plant) == 0


def test_a_good_candidate_is_promoted(planted: Planted) -> None:
    assert promotions(planted, trained_further) >= 18


def test_the_active_version_itself_is_not_promoted(planted: Planted) -> None:
    twin = planted.predictor(worn, 0)
    compared = planted.compared(twin)
    assert all(step.active_score == step.shadow_score for step in compared)
    named = [replace(step, shadow_version="twin@1") for step in compared]
    assert decide(named, twin, 0).active() == planted.active.version.version
