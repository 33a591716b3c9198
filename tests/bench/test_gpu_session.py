"""The session's one promise: every step leaves its log and its outcome, whatever became of the others."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.bench.gpu_session import KILL_AFTER_S, ONE_CALL, Step, main, planned_steps, run_step, step_environment
from tests.bench.report import environment, package_version


def test_a_failed_and_a_hanging_step_keep_nothing_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.gpu_session.EXTRA_LIMIT_S", 3.0)
    extra = ["broken=echo said; exit 3", "hangs=echo started; sleep 600 & sleep 600", "last=echo here"]
    arguments = [text for entry in extra for text in ("--then", entry)]
    status = main(["--out", str(tmp_path), *arguments, "--only", "broken", "hangs", "last"])
    outcomes = json.loads((tmp_path / "session.json").read_text())
    assert status == 1
    assert [(each["name"], each["timed_out"]) for each in outcomes] == [
        ("broken", False),
        ("hangs", True),
        ("last", False),
    ]
    assert (outcomes[0]["status"], outcomes[2]["status"]) == (3, 0)
    assert (tmp_path / "broken.txt").read_text() == "said\n"
    assert (tmp_path / "hangs.txt").read_text() == "started\n"
    assert (tmp_path / "last.txt").read_text() == "here\n"


def test_a_step_knows_the_package_without_an_installation(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    ask = "import promoe, compute_node, importlib.metadata as m; print(m.version('promoe'))"
    step = Step("version", (sys.executable, "-c", ask), 60)
    outcome = run_step(step, tmp_path, step_environment(site))
    assert outcome.status == 0
    assert (tmp_path / "version.txt").read_text().strip() == package_version("promoe")


def test_steps_are_planned_within_a_borrowed_call_and_extra_ones_are_named() -> None:
    steps = planned_steps(Path("/out"), ["verify_t1=true"], ["--rounds", "3"], ["--rounds", "2"], 1.0)
    assert [step.name for step in steps] == ["facts", "gpu_tests", "gpu_ablation", "bench_device", "verify_t1"]
    one_call = [step for step in steps if step.name in {*ONE_CALL, "verify_t1"}]
    assert sum(step.limit_s for step in one_call) + KILL_AFTER_S <= 595, "also when the last step has to be ended"
    assert "tests/compute_node/test_moe_forward.py" in steps[1].command, "parity over the flag combinations"
    assert "tests/bench/test_gpu_session.py" not in steps[1].command
    assert "tests/compute_node/test_expert_path.py" in steps[1].command, "policies with hints"
    assert steps[2].command[-2:] == ("--rounds", "3")
    assert steps[3].command[-2:] == ("--rounds", "2")
    with pytest.raises(ValueError, match="expected NAME=COMMAND"):
        planned_steps(Path("/out"), ["no command"], [], [], 1.0)


def test_a_report_names_its_commit_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.setenv("PROMOE_COMMIT", "abc123")
    assert environment()["commit"] == "abc123"
