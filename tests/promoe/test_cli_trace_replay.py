"""`promoe trace replay` becomes the replay: its help, its output and its exit status are the replay's."""

import subprocess
import sys
from pathlib import Path

import pytest

from promoe.trace_file import TraceWriter
from tests.promoe.traces import MadeUpRun


def run_promoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from promoe.cli.app import main; main()", "trace", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    shape = MadeUpRun()
    with TraceWriter(tmp_path / "made-up.trace", shape.header()) as writer:
        for event in shape.events():
            writer.append(event)
    return tmp_path / "made-up.trace"


def test_settings_and_output_pass_through(trace: Path) -> None:
    done = run_promoe("replay", str(trace), "--policy", "lru", "--cache-rate", "0.5", "--cache-rate", "1")
    assert done.returncode == 0, done.stderr
    assert "lru @ 0.5" in done.stdout
    assert "lru @ 1" in done.stdout


def test_failures_keep_their_exit_status(tmp_path: Path) -> None:
    absent = run_promoe("replay", str(tmp_path / "none"))
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr == f"error: There is no trace at {tmp_path / 'none'}.\n"
