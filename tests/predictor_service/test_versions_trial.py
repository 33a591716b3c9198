"""Versions that are tried: a canary and a shadow come and go, written down, and never end as what they were not."""

from pathlib import Path

import pytest

from predictor_service.predictor import Predictor
from predictor_service.version_log import VersionLog, Wish
from predictor_service.versions import Versions
from promoe.errors import InternalError, InvalidInput, ModelNotFound, ResourceExhausted
from promoe.hint import ObservedKind
from promoe.predictor_versions import VersionAction
from tests.predictor_service.test_versions import ANN, SPEC, NamedPredictor, load, make_versions


def begun(candidate: Predictor) -> None:
    """A shadow whose process comes up."""


def told(versions: Versions) -> list[tuple[VersionAction, str, str]]:
    return [(change.action, change.after, change.version) for change in versions.log.changes()]


def test_a_canary_has_a_share_until_it_is_rolled_back() -> None:
    versions = make_versions()
    change = versions.activate_canary("b@1", 0.25, ANN)
    assert change is not None
    assert [(number.name, number.value) for number in change.numbers] == [("share", 0.25)]
    assert versions.canary is not None
    assert (versions.active.version.version, versions.canary.predictor.version.version) == ("a@1", "b@1")
    assert versions.activate_canary("b@1", 0.25, ANN) is None
    assert versions.activate_canary("b@1", 0.5, ANN) is not None
    versions.rollback(ANN)
    assert versions.canary is None
    assert told(versions) == [
        (VersionAction.CANARY, "a@1", "b@1"),
        (VersionAction.CANARY, "a@1", "b@1"),
        (VersionAction.END_CANARY, "a@1", "b@1"),
    ]
    with pytest.raises(InvalidInput, match="Nothing was active before"):
        versions.rollback(ANN)


def test_a_canary_becomes_active_without_being_loaded_again() -> None:
    versions = make_versions()
    versions.activate_canary("none@1", 0.1, ANN)
    assert versions.canary is not None
    tried = versions.canary.predictor
    versions.activate("none@1", ANN)
    assert versions.active is tried
    assert versions.canary is None
    assert versions.previous is not None
    assert versions.previous.version.version == "a@1"


def test_activating_what_is_active_ends_the_canary() -> None:
    versions = make_versions()
    versions.activate_canary("b@1", 0.1, ANN)
    assert versions.activate("a@1", ANN) is not None
    assert versions.canary is None
    assert versions.previous is None, "nothing was active in between"


@pytest.mark.parametrize(
    ("version", "share", "error", "sentence"),
    [
        ("a@1", 0.5, InvalidInput, "makes the hints already"),
        ("b@1", 1.5, InvalidInput, "canary's share is 1.5"),
        ("c@1", 0.5, InvalidInput, "one kind of hidden states"),
        ("broken@1", 0.5, InternalError, "tried out"),
        ("nowhere@1", 0.5, ModelNotFound, "no version"),
    ],
)
def test_what_cannot_be_a_canary_changes_nothing(
    version: str, share: float, error: type[Exception], sentence: str
) -> None:
    versions = make_versions()
    before = versions.lineup
    with pytest.raises(error, match=sentence):
        versions.activate_canary(version, share, ANN)
    assert versions.lineup is before
    assert told(versions) == []


def test_a_shadow_looks_on_until_it_is_cleared() -> None:
    versions = make_versions()
    asked: list[str] = []
    change = versions.set_shadow("none@1", ANN, lambda candidate: asked.append(candidate.version.version))
    assert change is not None
    assert (change.before, change.after, change.version) == ("a@1", "a@1", "none@1")
    assert versions.set_shadow("none@1", ANN, begun) is None
    assert asked == ["none@1"]
    assert [wishes.version for wishes in versions.lineup.onlookers] == ["none@1"]
    assert versions.clear_shadow(ANN) is not None
    assert versions.clear_shadow(ANN) is None
    assert (versions.shadow, versions.lineup.onlookers) == (None, ())


def test_a_shadow_that_does_not_begin_is_none() -> None:
    versions = make_versions()

    def fail(_: Predictor) -> None:
        raise InternalError("It does not start.")

    with pytest.raises(InternalError, match="does not start"):
        versions.set_shadow("none@1", ANN, fail)
    assert versions.shadow is None
    assert told(versions) == []


def test_a_shadow_reads_what_the_active_version_reads() -> None:
    versions = make_versions()
    with pytest.raises(InvalidInput, match="one kind of hidden states"):
        versions.set_shadow("c@1", ANN, begun)
    with pytest.raises(InvalidInput, match="makes the hints already"):
        versions.set_shadow("a@1", ANN, begun)
    assert versions.shadow is None


def test_a_shadow_that_becomes_active_looks_on_no_more() -> None:
    versions = make_versions()
    versions.set_shadow("b@1", ANN, begun)
    versions.activate("b@1", ANN)
    assert (versions.shadow, versions.lineup.onlookers) == (None, ())
    versions.set_shadow("a@1", ANN, begun)
    versions.activate("none@1", ANN)
    assert versions.shadow is not None, "it is not what became active"


def test_a_shadow_that_can_be_shown_nothing_any_more_ends() -> None:
    versions = make_versions()
    versions.set_shadow("b@1", ANN, begun)
    versions.activate("c@1", ANN)
    assert versions.active.version.observed is ObservedKind.LAYER_INPUT
    assert versions.shadow is None


def test_what_is_tried_is_not_gone_on_with_after_a_restart(tmp_path: Path) -> None:
    versions = Versions(SPEC, NamedPredictor("a@1"), load, VersionLog(tmp_path / "history", "s1"))
    versions.activate("b@1", ANN)
    versions.activate_canary("none@1", 0.5, ANN)
    versions.set_shadow("plugin", ANN, begun)
    assert VersionLog(tmp_path / "history", "s1").last_active() == "b@1"


def test_what_cannot_be_written_down_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    versions = make_versions(tmp_path / "file" / "history")
    with pytest.raises(ResourceExhausted):
        versions.activate_canary("b@1", 0.5, ANN)
    with pytest.raises(ResourceExhausted):
        versions.set_shadow("b@1", ANN, begun)
    assert (versions.canary, versions.shadow) == (None, None)


def test_numbers_that_decided_are_written_down() -> None:
    versions = make_versions()
    before = versions.lineup
    versions.show_more(is_scored=False)
    assert versions.lineup is before, "nothing changes, and nobody is told"
    versions.show_more(is_scored=True)
    assert versions.lineup.announced.wants_ready
    versions.activate("b@1", Wish("ann", "why not", expected="a@1"))
    assert versions.lineup.is_scored, "who watches goes on watching"
