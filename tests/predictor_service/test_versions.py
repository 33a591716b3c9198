"""What is active changes whole and written down, or not at all."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from predictor_service.predictor import Predictor
from predictor_service.version_log import VersionLog, Wish
from predictor_service.versions import Versions
from promoe.errors import InternalError, InvalidInput, ModelMismatch, ModelNotFound, ResourceExhausted
from promoe.hint import Hint, Observation, ObservedKind, PredictorVersion, StepStart
from promoe.predictor_versions import VersionAction
from tests.predictor_service.layer_events import make_spec

SPEC = make_spec(layers=3, experts=8, per_token=2, hidden=4)
ANN = Wish("ann", "why not")


class NamedPredictor:
    """Hints expert 1 of the observed layer, under its name; a session of itself."""

    def __init__(self, version: str, observed: ObservedKind = ObservedKind.ROUTER_INPUT, score: float = 0.5) -> None:
        self.version = PredictorVersion(version, version.partition("@")[0], observed, (0,), True, True)
        self.score = score
        self.num_layers_seen = 0

    def open_session(self) -> "NamedPredictor":
        return self

    def begin_step(self, start: StepStart) -> None:
        pass

    def observe(self, observation: Observation) -> Sequence[Hint]:
        self.num_layers_seen += 1
        step, layer = observation.step, observation.layer
        ids, scores = np.array([1], np.uint16), np.array([self.score], np.float32)
        return [Hint(step, layer, step, layer, ids, scores, 1, self.version.version)]

    def end_requests(self, request_ids: Sequence[str]) -> None:
        pass


class BrokenPredictor(NamedPredictor):
    def observe(self, observation: Observation) -> Sequence[Hint]:
        raise ZeroDivisionError("a bug of the plug-in")


KNOWN = {
    "b@1": NamedPredictor("b@1"),
    "c@1": NamedPredictor("c@1", ObservedKind.LAYER_INPUT),
    "none@1": NamedPredictor("none@1", ObservedKind.NONE),
    "broken@1": BrokenPredictor("broken@1"),
    "nan@1": NamedPredictor("nan@1", score=float("nan")),
    "liar@1": NamedPredictor("other@1"),
    "plugin": NamedPredictor("plugin@3"),
}


def load(version: str) -> Predictor:
    if version not in KNOWN:
        raise ModelNotFound(f"There is no version {version}.")
    return KNOWN[version]


def make_versions(path: Path | None = None) -> Versions:
    return Versions(SPEC, NamedPredictor("a@1"), load, VersionLog(path, "s1"))


def active(versions: Versions) -> tuple[str, str | None]:
    previous = versions.previous
    return versions.active.version.version, None if previous is None else previous.version.version


def test_a_change_keeps_what_was_before() -> None:
    versions = make_versions()
    change = versions.activate("b@1", ANN)
    assert change is not None
    assert (change.before, change.after, change.who, change.action) == ("a@1", "b@1", "ann", VersionAction.ACTIVATE)
    assert active(versions) == ("b@1", "a@1")
    versions.activate("c@1", ANN)
    assert active(versions) == ("c@1", "b@1")
    assert [entry.after for entry in versions.log.changes()] == ["b@1", "c@1"]


def test_rollback_goes_back_and_forth() -> None:
    versions = make_versions()
    versions.activate("b@1", ANN)
    first, kept = versions.active, versions.previous
    assert versions.rollback(ANN).action is VersionAction.ROLLBACK
    assert versions.active is kept, "it was kept, not loaded again"
    versions.rollback(ANN)
    assert versions.active is first


def test_without_a_version_before_there_is_no_rollback() -> None:
    versions = make_versions()
    with pytest.raises(InvalidInput, match="Nothing was active before a@1"):
        versions.rollback(ANN)
    assert versions.log.changes() == []


def test_what_is_active_already_is_not_written_down() -> None:
    versions = make_versions()
    assert versions.activate("a@1", ANN) is None
    assert versions.log.changes() == []


def test_the_one_before_is_not_loaded_again() -> None:
    versions = make_versions()
    kept = versions.active
    versions.activate("b@1", ANN)
    versions.activate("a@1", ANN)
    assert versions.active is kept


def test_a_plug_in_is_asked_for_by_its_name() -> None:
    versions = make_versions()
    change = versions.activate("plugin", ANN)
    assert change is not None
    assert change.after == "plugin@3"
    assert versions.activate("plugin", ANN) is None


@pytest.mark.parametrize(
    ("version", "error", "sentence"),
    [
        ("nowhere@1", ModelNotFound, "There is no version"),
        ("broken@1", InternalError, "failed when it was tried out"),
        ("nan@1", InvalidInput, "no numbers"),
        ("liar@1", ModelMismatch, "other@1 is what was found"),
    ],
)
def test_what_cannot_predict_never_becomes_active(version: str, error: type[Exception], sentence: str) -> None:
    versions = make_versions()
    with pytest.raises(error, match=sentence):
        versions.activate(version, ANN)
    assert active(versions) == ("a@1", None)
    assert versions.log.changes() == []


def test_every_layer_is_tried_out() -> None:
    candidate = KNOWN["none@1"]
    before = candidate.num_layers_seen
    make_versions().activate("none@1", ANN)
    assert candidate.num_layers_seen == before + SPEC.num_moe_layers


def test_what_cannot_be_written_down_does_not_happen(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    versions = make_versions(tmp_path / "file" / "history")
    with pytest.raises(ResourceExhausted):
        versions.activate("b@1", ANN)
    assert active(versions) == ("a@1", None)
    versions.started()  # said in the log, and served all the same


def test_who_believes_something_else_is_told() -> None:
    versions = make_versions()
    with pytest.raises(ModelMismatch, match=r"ann expected b@1 to be active, and it is a@1"):
        versions.activate("c@1", Wish("ann", "", expected="b@1"))
    with pytest.raises(ModelMismatch):
        versions.rollback(Wish("ann", "", expected="b@1"))
    assert versions.activate("b@1", Wish("ann", "", expected="a@1")) is not None


def test_of_two_admins_at_once_one_is_told() -> None:
    versions = make_versions()

    def try_to(version: str) -> bool:
        try:
            versions.activate(version, Wish(version, "", expected="a@1"))
        except ModelMismatch:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(try_to, ["b@1", "c@1"]))
    assert outcomes.count(True) == 1
    assert versions.active.version.version == ["b@1", "c@1"][outcomes.index(True)]
    assert len(versions.log.changes()) == 1
