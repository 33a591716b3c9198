"""A configuration that was changed: the predictor's endpoint is taken over, everything else is named."""

import logging
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from compute_node.config import ComputeConfig
from compute_node.config_reload import AskedConfig, ConfigReload
from compute_node.hint_inbox import HintInbox
from compute_node.hint_link import HintLink
from compute_node.takeovers import Takeovers
from promoe.config import LogConfig, Settings
from promoe.errors import Overloaded, Unavailable
from promoe.node_report import PredictorSwitch
from tests.contract.hint_node import SPEC

STARTED = AskedConfig(ComputeConfig(Path("p"), "unix:s", predictor_endpoint="unix:a"), LogConfig())
SWITCH = PredictorSwitch(0.0, "unix:a", "unix:b", "x", "y", is_return=False)


class Recorded(Takeovers):
    """Asked, it remembers and answers as the test wants."""

    def __init__(self) -> None:
        super().__init__(HintLink(SPEC, HintInbox()), "")
        self.asked: list[str] = []
        self.answer: PredictorSwitch | Exception = SWITCH

    def connect(self, endpoint: str, who: str, why: str) -> "Future[PredictorSwitch | None]":
        self.asked.append(endpoint)
        if isinstance(self.answer, Overloaded):
            raise self.answer
        outcome: Future[PredictorSwitch | None] = Future()
        if isinstance(self.answer, Exception):
            outcome.set_exception(self.answer)
        else:
            outcome.set_result(self.answer)
        return outcome


class Changed:
    """A configuration, and the node that reads it."""

    def __init__(self, takeovers: Takeovers | None) -> None:
        self.now = STARTED
        self.reload = ConfigReload(STARTED, lambda: self.now, takeovers).reload

    def compute(self, **changes: object) -> None:
        self.now = replace(self.now, compute=replace(self.now.compute, **changes))  # type: ignore[arg-type]
        self.reload()


@pytest.fixture
def takeovers() -> Recorded:
    return Recorded()


@pytest.fixture
def changed(takeovers: Recorded) -> Changed:
    return Changed(takeovers)


def test_a_changed_endpoint_is_connected_to_once(changed: Changed, takeovers: Recorded) -> None:
    changed.reload()
    changed.compute(predictor_endpoint="unix:b")
    changed.reload()
    changed.compute(predictor_endpoint="unix:a")
    assert takeovers.asked == ["unix:b", "unix:a"]


@pytest.mark.parametrize("trouble", [Unavailable("x"), Overloaded("x")])
def test_what_was_refused_is_tried_again(changed: Changed, takeovers: Recorded, trouble: Exception) -> None:
    takeovers.answer = trouble
    changed.compute(predictor_endpoint="unix:b")
    changed.reload()
    takeovers.answer = SWITCH
    changed.reload()
    changed.reload()
    assert takeovers.asked == ["unix:b"] * 3


def test_what_cannot_change_is_named(changed: Changed, takeovers: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    changed.now = replace(changed.now, log=LogConfig("debug"))
    changed.compute(policy="lru", predictor_trial_s=1.0)
    assert "not while the node serves: compute.predictor_trial_s, compute.policy, log.level." in caplog.text
    changed.compute(predictor_endpoint="")
    assert "was emptied; a serving node keeps its predictor" in caplog.text
    assert takeovers.asked == []


def test_without_a_use_for_hints_there_is_nothing_to_change(caplog: pytest.LogCaptureFixture) -> None:
    Changed(None).compute(predictor_endpoint="unix:b")
    assert "the policy ignores hints" in caplog.text


def test_what_cannot_be_read_changes_nothing(
    tmp_path: Path, takeovers: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "promoe.toml"

    def read() -> AskedConfig:
        return AskedConfig(Settings(file).section("compute", ComputeConfig), LogConfig())

    reload = ConfigReload(STARTED, read, takeovers).reload
    for text, reason in (
        ("[compute", "is not TOML"),
        ("[compute]\nx = 1", "x is not a setting"),
        (None, "There is no"),
    ):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        reload()
        assert "everything stays as it is" in caplog.text
        assert reason in caplog.text
        caplog.clear()
    file.write_text('[compute]\npack = "p"\nstore_endpoint = "unix:s"\npredictor_endpoint = "unix:a"\n')
    reload()
    assert "nothing has changed" in caplog.text
    assert takeovers.asked == []
