"""The run folder: one holder, state that dies with it, sockets that fit, nobody else's folder."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe.cli.run_dir import DEFAULT_LISTEN, RunDir, StackState, default_run_dir, find_endpoint, uptime_s
from promoe.errors import AlreadyRunning, InvalidInput, ResourceExhausted


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: the path of pytest's own may be too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def make_state(run_dir: RunDir) -> StackState:
    return StackState(os.getpid(), "ready", "127.0.0.1:1234", run_dir.store_endpoint, "demo", "/packs/demo", 0.0)


def test_state_lives_as_long_as_the_holder(folder: Path) -> None:
    run_dir = RunDir(folder / "run")
    assert run_dir.read_state() is None
    with run_dir.hold():
        run_dir.write_state(make_state(run_dir))
        assert RunDir(folder / "run").read_state() == make_state(run_dir)
        assert find_endpoint(None, run_dir) == "127.0.0.1:1234"
    assert run_dir.read_state() is None
    assert find_endpoint(None, run_dir) == DEFAULT_LISTEN


def test_state_of_a_killed_holder_is_not_believed(folder: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from promoe.cli.run_dir import RunDir, StackState\n"
        "run_dir = RunDir(Path(sys.argv[1]))\n"
        "with run_dir.hold():\n"
        "    run_dir.write_state(StackState(os.getpid(), 'ready', 'e', 's', 'm', 'p', 0.0))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    run_dir = RunDir(folder)
    assert (folder / "stack.json").exists()
    assert run_dir.read_state() is None
    with run_dir.hold():
        assert run_dir.read_state() is None


def test_a_second_holder_is_refused_with_the_first_ones_process(folder: Path) -> None:
    run_dir = RunDir(folder)
    with run_dir.hold():
        run_dir.write_state(make_state(run_dir))
        with (
            pytest.raises(AlreadyRunning, match=rf"already running in {folder} \(process {os.getpid()}\)"),
            RunDir(folder).hold(),
        ):
            pass
    with RunDir(folder).hold():
        pass


def test_the_endpoint_asked_for_wins_then_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(folder)
    with run_dir.hold():
        run_dir.write_state(make_state(run_dir))
        monkeypatch.setenv("PROMOE_ENDPOINT", "unix:/from/environment")
        assert find_endpoint("asked:1", run_dir) == "asked:1"
        assert find_endpoint(None, run_dir) == "unix:/from/environment"


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOE_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert default_run_dir() == Path(f"/tmp/promoe-{os.getuid()}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_run_dir() == Path("/run/user/7/promoe")
    monkeypatch.setenv("PROMOE_RUN_DIR", "/elsewhere")
    assert RunDir().path == Path("/elsewhere")


def test_a_path_too_long_for_sockets_is_refused(folder: Path) -> None:
    with (
        pytest.raises(InvalidInput, match=r"too long.*allows 107\. Give a shorter --run-dir"),
        RunDir(folder / ("x" * 90)).hold(),
    ):
        pass


def test_a_folder_that_others_write_or_own_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(InvalidInput, match="Others may write"), RunDir(folder).hold():
        pass
    folder.chmod(0o700)
    (folder / "link").symlink_to(folder / "target")
    (folder / "target").mkdir()
    with pytest.raises(InvalidInput, match="not a folder of this user"), RunDir(folder / "link").hold():
        pass


def test_a_folder_that_cannot_be_made_is_a_sentence(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(ResourceExhausted, match=r"cannot be made.*--run-dir"), RunDir(folder / "file" / "run").hold():
        pass


def test_state_of_another_version_is_ignored(folder: Path) -> None:
    run_dir = RunDir(folder)
    with run_dir.hold():
        (folder / "stack.json").write_text('{"pid": 1}')
        assert run_dir.read_state() is None
        (folder / "stack.json").write_text("{")
        assert run_dir.read_state() is None


def test_uptime_never_runs_backwards(folder: Path) -> None:
    state = make_state(RunDir(folder))
    assert uptime_s(state) > 0
    assert uptime_s(StackState(1, "ready", "e", "s", "m", "p", 1e12)) == 0
