"""`promoe predictor` becomes its tools, with their options as they were given."""

import importlib.util
import subprocess
import sys

import pytest

from promoe.cli.predictor import TOOLS, tool_command

PROMOE = [sys.executable, "-c", "from promoe.cli.app import main; main()"]


@pytest.mark.parametrize("name", TOOLS)
def test_every_subcommand_has_its_tool(name: str) -> None:
    module, summary = TOOLS[name]
    assert importlib.util.find_spec(module) is not None
    assert summary.endswith(".")


def test_options_reach_the_tool_as_they_are() -> None:
    command = tool_command("a.b", ["x", "--y", "1 2"])
    assert command == [sys.executable, "-P", "-m", "a.b", "x", "--y", "1 2"]


def test_a_missing_artifact_is_told_by_the_tool() -> None:
    done = subprocess.run(
        [*PROMOE, "predictor", "show", "no-such-file.safetensors"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "There is no predictor artifact at no-such-file.safetensors." in done.stderr


def test_without_a_subcommand_there_is_help() -> None:
    done = subprocess.run([*PROMOE, "predictor"], capture_output=True, text=True, check=False)
    for name in TOOLS:
        assert name in done.stdout + done.stderr
