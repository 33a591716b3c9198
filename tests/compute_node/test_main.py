"""The command: a bug is not taken for a wrong setting, and a wrong setting is one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compute_node import __main__ as command
from compute_node.config_reload import AskedConfig
from promoe.config import SettingUnfit
from promoe.errors import EXIT_PACK_DAMAGED, PackDamaged, Unavailable


def run_with(failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    async def fail(asked: AskedConfig, read: Callable[[], AskedConfig] | None) -> None:
        assert read is None, "there is no file to be read again"
        raise failure

    monkeypatch.setattr(command, "serve", fail)
    return command.main(["--set", f"compute.pack={tmp_path}", "--set", "compute.store_endpoint=unix:/tmp/none.sock"])


def test_a_bug_s_value_error_comes_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        run_with(ValueError("not enough values to unpack"), monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (SettingUnfit("compute.x is 9; allowed: 1 to 8"), 2),
        (Unavailable("Nobody is there."), 1),
        (PackDamaged("L1E3 is damaged."), EXIT_PACK_DAMAGED),
    ],
)
def test_what_a_person_can_mend_is_a_sentence_and_a_status(
    failure: Exception, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(failure, monkeypatch, tmp_path) == status
    assert capsys.readouterr().err == f"compute_node: {failure}\n"


def test_a_setting_that_cannot_be_read_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--set", "compute.speed=3"]) == 2
    assert capsys.readouterr().err.startswith("compute_node: compute.speed is not a setting; known in [compute]: ")
