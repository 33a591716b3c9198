"""`promoe predictor` becomes its tools, with their options as they were given, and asks a running service."""

import getpass
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from predictor_service.admin.in_use import history_path
from predictor_service.artifact import write_artifact
from predictor_service.version_log import VersionLog, Wish
from promoe.cli.predictor import TOOLS, tool_command
from promoe.predictor_versions import VersionAction
from tests.packs import write_synthetic_pack
from tests.predictor_service.test_artifact import MANIFEST, TENSORS
from tests.running_predictor import RunningPredictor

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


def run(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PROMOE_HOME": str(home), "PROMOE_RUN_DIR": str(home / "run"), "COLUMNS": "200"}
    return subprocess.run(
        [*PROMOE, "predictor", *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "trained.safetensors", MANIFEST, TENSORS)
    return tmp_path / "trained.safetensors"


def test_a_version_is_published_where_a_stack_looks_for_it_and_removed(tmp_path: Path, artifact: Path) -> None:
    done = run(tmp_path, "publish", str(artifact))
    assert (done.returncode, done.stdout) == (0, f"a@1 is published in {tmp_path / 'predictors'}.\n")
    assert run(tmp_path, "publish", str(artifact)).returncode == 0
    assert (tmp_path / "predictors/a@1.safetensors").is_file()
    assert run(tmp_path, "remove", "a@1").stdout == f"a@1 is removed from {tmp_path / 'predictors'}.\n"
    assert run(tmp_path, "remove", "a@1").returncode == 1


def test_another_registry_can_be_named(tmp_path: Path, artifact: Path) -> None:
    assert run(tmp_path, "publish", str(artifact), "--registry", str(tmp_path / "mine")).returncode == 0
    assert (tmp_path / "mine/a@1.safetensors").is_file()


def test_the_oldest_versions_go(tmp_path: Path) -> None:
    for version in range(4):
        path = tmp_path / f"{version}.safetensors"
        write_artifact(path, replace(MANIFEST, version=str(version)), TENSORS)
        done = run(tmp_path, "publish", str(path), "--keep", "2")
        assert done.returncode == 0
        os.utime(tmp_path / f"predictors/a@{version}.safetensors", (1000 + version, 1000 + version))
    assert "a@1 was removed: the newest 2 are kept." in done.stdout
    assert sorted(path.name for path in (tmp_path / "predictors").iterdir()) == ["a@2.safetensors", "a@3.safetensors"]


def test_what_a_service_would_go_on_with_is_removed_by_force_only(tmp_path: Path, artifact: Path) -> None:
    run(tmp_path, "publish", str(artifact))
    log = VersionLog(history_path(tmp_path / "predictors", "0badcafe"), "s1")
    log.add(VersionAction.ACTIVATE, "a@0", "a@1", Wish("ann", ""))
    refused = run(tmp_path, "remove", "a@1")
    assert refused.returncode == 1
    assert "a@1 is in use by a service" in refused.stderr
    assert run(tmp_path, "remove", "a@1", "--force").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("publish", "nowhere.safetensors"), "There is no predictor artifact at nowhere.safetensors."),
        (("remove", "../x@1"), "expected NAME@VERSION"),
        (("list",), "predictor.sock"),
        (("activate", "a@1"), "predictor.sock"),
        (("watch", "--once"), "predictor.sock"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_running_service_is_asked_and_told(socket_dir: Path) -> None:
    write_synthetic_pack(socket_dir / "pack", layers=5)
    (socket_dir / "run").mkdir()
    registry = f"predictor.registry={socket_dir / 'predictors'}"
    with RunningPredictor(socket_dir / "pack", socket_dir / "run", registry) as service:
        service.wait_until_serving()
        changed = run(socket_dir, "activate", "frequency", "--why", "to see", "--if-active", "transition@1")
        assert changed.stdout == "frequency@1 is active now; before it was transition@1.\n"
        assert run(socket_dir, "activate", "frequency").stdout == "frequency is active already.\n"
        refused = run(socket_dir, "rollback", "--if-active", "transition@1")
        assert (refused.returncode, "expected transition@1 to be active" in refused.stderr) == (1, True)
        assert run(socket_dir, "rollback").stdout == "transition@1 is active again, in place of frequency@1.\n"
        listed = {info["version"]: info for info in json.loads(run(socket_dir, "list", "--json").stdout)}
        assert (listed["transition@1"]["state"], listed["frequency@1"]["state"]) == ("active", "previous")
        told = json.loads(run(socket_dir, "history", "--json", "-n", "2").stdout)
        assert [(line["action"], line["why"]) for line in told] == [
            ("activate", "to see"),
            ("rollback", "asked for at the command line"),
        ]
        tried = run(socket_dir, "activate", "none", "--canary", "12.5%", "--why", "a little")
        assert tried.stdout == "none@1 makes the hints of 12.5 % of the requests; transition@1 of the others.\n"
        assert "that share of the requests already" in run(socket_dir, "activate", "none", "--canary", ".125").stdout
        ended = run(socket_dir, "rollback")
        assert ended.stdout == "none@1 makes no hints any more; transition@1 makes those of all requests.\n"
        assert run(socket_dir, "shadow", "frequency").stdout == "frequency@1 looks on now.\n"
        assert run(socket_dir, "shadow", "frequency").stdout == "frequency looks on already.\n"
        watched = run(socket_dir, "watch", "--once", "--interval", "0.1").stdout
        for word in ("transition@1", "active", "frequency@1", "shadow", "Nothing was scored yet"):
            assert word in watched
        (document,) = [json.loads(run(socket_dir, "watch", "--json", "--interval", "0.1").stdout)]
        assert [quality["state"] for quality in document["qualities"]][:2] == ["active", "shadow"]
        assert run(socket_dir, "shadow", "--clear").stdout == "frequency@1 looks on no more.\n"
        assert run(socket_dir, "shadow", "--clear").stdout == "Nobody looks on.\n"
        shown = run(socket_dir, "list").stdout + run(socket_dir, "history").stdout
        for word in ("transition@1", "active", "previous", "rollback", getpass.getuser()):
            assert word in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("activate", "a@1", "--canary", "much"), "is not a share"),
        (("activate", "a@1", "--canary", "100%"), "is not a share"),
        (("shadow",), "Name a version, or say --clear."),
        (("shadow", "a@1", "--clear"), "Name a version, or say --clear."),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
