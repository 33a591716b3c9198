"""One store per run folder, and a successor that knows whom to wait for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expert_store.config import StoreConfig
from expert_store.run_dir import AttachedNode, RunDir, StoreState
from promoe.errors import AlreadyRunning, InvalidInput, ResourceExhausted


def config_in(tmp_path: Path) -> StoreConfig:
    return StoreConfig(pack=tmp_path, run_dir=tmp_path / "deep" / "run")


def test_a_second_store_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = RunDir(config_in(tmp_path))
    with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}\) holds .*store.lock"):
        RunDir(config_in(tmp_path))
    first.close()
    RunDir(config_in(tmp_path)).close()


def test_a_killed_store_leaves_no_lock(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    program = f"""
import pathlib, sys
from expert_store.config import StoreConfig
from expert_store.run_dir import RunDir
held = RunDir(StoreConfig(pathlib.Path("."), pathlib.Path({str(config.run_dir)!r})))
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunning, match=str(holder.pid)):
            RunDir(config)
        holder.kill()
    RunDir(config).close()


def test_the_successor_reads_what_was_written(tmp_path: Path) -> None:
    run_dir = RunDir(config_in(tmp_path))
    assert run_dir.read_state() is None
    state = StoreState("0" * 32, "fingerprint", (AttachedNode("node", 12, 34), AttachedNode("other", 0, 0)))
    run_dir.write_state(state)
    run_dir.close()
    successor = RunDir(config_in(tmp_path))
    assert successor.read_state() == state
    successor.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nodes": 3}', '{"nodes": [{"pid": 3}]}', '{"nodes": []}', "\0" * 99])
def test_a_state_that_cannot_be_read_is_no_state(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = RunDir(config_in(tmp_path))
    (tmp_path / "deep" / "run" / "store.json").write_text(text)
    assert run_dir.read_state() is None
    assert "cannot be read" in caplog.text
    run_dir.close()


def test_a_state_that_cannot_be_written_is_said_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = RunDir(config_in(tmp_path))
    (tmp_path / "deep" / "run" / "store.json.tmp").mkdir()
    run_dir.write_state(StoreState("u", "f", ()))
    assert "cannot be written (Is a directory)" in caplog.text
    run_dir.close()


def test_a_living_process_is_told_from_a_dead_one_and_from_a_reused_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        node = AttachedNode.of("node", process.pid)
        assert node is not None
        assert node.pid == process.pid
        assert node.may_live()
        assert not AttachedNode("node", process.pid, node.started_ticks - 1).may_live()
        process.kill()
        process.wait()
        assert not node.may_live()
        assert AttachedNode.of("node", process.pid) is None, "nobody waits for it"


def test_a_zombie_holds_no_arena() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        node = AttachedNode.of("node", process.pid)
        assert node is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not node.may_live()
        assert AttachedNode.of("node", process.pid) is None


def test_a_process_in_another_pid_namespace_may_live() -> None:
    node = AttachedNode.of("node", 0)
    assert node == AttachedNode("node", 0, 0)
    assert node.may_live()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file")
    with pytest.raises(ResourceExhausted, match=r"deep/run cannot be used .*store.run_dir"):
        RunDir(config_in(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_strangers_folder_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.run_dir.mkdir(parents=True)
    os.chown(config.run_dir, 54321, -1)
    with pytest.raises(InvalidInput, match="belongs to user 54321"):
        RunDir(config)
