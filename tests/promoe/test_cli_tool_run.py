"""Steps that make a pack: stopped as a whole, and the terminal is as before."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from promoe.cli.pack_cache import PackPlan, ToolCommand
from promoe.cli.stop_signals import StopSignals
from promoe.cli.tool_run import make_pack

DEADLINE_S = 30.0

STEP_WITH_A_BAR_AND_A_CHILD = """
import subprocess, sys, time
from pathlib import Path
from rich.console import Console
from rich.progress import Progress

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(sys.argv[1]).write_text(str(child.pid))
with Progress(console=Console(stderr=True)) as bars:
    bars.add_task("packing", total=10)
    time.sleep(60)
"""

MAKE_PACK = """
import sys
from pathlib import Path
from promoe.cli.pack_cache import PackPlan, ToolCommand
from promoe.cli.stop_signals import StopSignals
from promoe.cli.tool_run import make_pack

folder = Path(sys.argv[1])
plan = PackPlan("tiny", folder / "pack", (ToolCommand("pack tiny", "tiny_step", (str(folder / "child"),)),))
with StopSignals() as stop:
    print("made" if make_pack(plan, stop) else "stopped", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny_step.py").write_text(STEP_WITH_A_BAR_AND_A_CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    return tmp_path


def read_until(fd: int, words: bytes, read: bytes = b"") -> bytes:
    end_s = time.perf_counter() + DEADLINE_S
    while words not in read:
        assert select.select([fd], [], [], max(0.0, end_s - time.perf_counter()))[0], read
        read += os.read(fd, 4096)
    return read


def test_a_stopped_step_leaves_neither_children_nor_a_hidden_cursor(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", MAKE_PACK, str(folder)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            screen = read_until(ours, b"packing", read_until(ours, b"\x1b[?25l"))
            child = psutil.Process(int((folder / "child").read_text()))
            process.send_signal(signal.SIGINT)
            screen = read_until(ours, b"stopped", screen)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            os.close(ours)
    assert screen.rfind(b"\x1b[?25h") > screen.rfind(b"\x1b[?25l")
    _, alive = psutil.wait_procs([child], timeout=DEADLINE_S)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_second_promoe_waits_for_the_first_ones_pack_but_not_for_ever(folder: Path) -> None:
    (folder / "tiny_step.py").write_text("")
    plan = PackPlan("tiny", folder / "pack", (ToolCommand("pack tiny", "tiny_step", ()),))
    holder = f"flock {folder / 'pack.lock'} bash -c 'echo held; read line'"
    with (
        subprocess.Popen(["bash", "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
        StopSignals() as stop,
    ):
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "held\n"
        os.kill(os.getpid(), signal.SIGTERM)
        assert not make_pack(plan, stop)
        first.stdin.write("go on\n")
        first.stdin.close()
        assert first.wait(DEADLINE_S) == 0
        stop.count = 0
        assert make_pack(plan, stop)
