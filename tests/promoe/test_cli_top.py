"""`promoe top` against scripted nodes over real sockets, in a pipe and in a real terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promoe.cli.keyboard import Keyboard
from promoe.cli.stop_signals import StopSignals
from promoe.cli.top import NodeWatch, TopFlags, top
from promoe.client import Client
from promoe.errors import Overloaded, Unavailable
from promoe.retry import RetryPolicy
from tests.promoe.scripted_inference import HELLO, ScriptedInference, serve_in_thread

DEADLINE_S = 30.0
ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def endpoint(node: ScriptedInference) -> Iterator[str]:
    with serve_in_thread(node) as endpoint:
        yield endpoint


def test_once_prints_one_picture(endpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    svg = tmp_path / "top.svg"
    top(TopFlags(interval=0.05, once=True, svg=svg, endpoint=endpoint))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"promoe top · {endpoint} · tiny on cpu, emulated link of 1.00 GB/s")
    assert "cache rate 0.5: 4 of 8 experts per layer" in lines[1]
    rows = [line[:12] for line in lines if line.startswith("L")]
    # Bytes 0 to 31: absent, resident, loading twice, hinted twice, loading; then routed, then missed.
    assert rows == ["L0  ·█^^++^^", "L1  oo^^oo^^", "L2  !!!!!!!!", "L3  !!!!!!!!"]
    assert any("decode" in line and "20 tok" in line for line in lines)
    picture = svg.read_text()
    assert picture.startswith("<svg")
    assert "#ff4040" in picture.lower(), "a picture has colours wherever it is made"


def test_a_pipe_gets_one_picture_without_escapes(endpoint: str) -> None:
    command = [sys.executable, "-c", "from promoe.cli.app import main; main()", "top", "--interval", "0.05"]
    ended = subprocess.run([*command, "-e", endpoint], capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    assert ended.stdout.startswith("promoe top")
    assert "\x1b" not in ended.stdout
    assert ended.stderr == ""


def test_once_says_that_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        top(TopFlags(once=True, endpoint=f"unix:{tmp_path}/none.sock"))


def test_a_node_may_go_and_come_back(node: ScriptedInference, endpoint: str) -> None:
    with Client(endpoint, ONCE) as client:
        watch = NodeWatch(endpoint, client)
        watch.look()
        watch.look()
        assert watch.frame(None).away_s is None
        assert watch.frame(None).lately is not None
        node.unary_errors = [Unavailable("Draining."), Overloaded("Full.")]
        for trouble in ("Draining.", "Full."):
            watch.look()
            gone = watch.frame(None)
            assert gone.away_s is not None
            assert trouble in gone.trouble
            assert gone.sample is not None
        node.instance_id = "i2"
        watch.look()
        back = watch.frame(None)
        assert (back.away_s, back.lately) == (None, None), "another process: its counters begin anew"
        assert back.sample is not None
        assert back.sample.info.service.instance_id == "i2"


class TopTerminal:
    """`promoe top` in a pseudo terminal of 80x24."""

    def __init__(self, *arguments: str) -> None:
        self._fd, child_fd = pty.openpty()
        termios.tcsetwinsize(child_fd, (24, 80))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from promoe.cli.app import main; main()", "top", *arguments],
            stdin=child_fd, stdout=child_fd, stderr=child_fd, close_fds=True,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )  # fmt: skip
        self._child_fd = child_fd
        self.screen = ""

    def read_until(self, is_there: Callable[[str], bool]) -> str:
        """What was written since the last call, up to where the condition holds."""
        deadline_s = time.perf_counter() + DEADLINE_S
        written = b""
        while not is_there(written.decode(errors="ignore")):
            remaining_s = deadline_s - time.perf_counter()
            assert remaining_s > 0, written
            if select.select([self._fd], [], [], remaining_s)[0]:
                written += os.read(self._fd, 65536)
        self.screen += written.decode(errors="ignore")
        return written.decode(errors="ignore")

    def press(self, key: bytes) -> None:
        os.write(self._fd, key)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._child_fd)[3] & termios.ECHO)

    def end(self) -> int:
        """Its exit code, with the rest read."""
        self.read_until(lambda text: "\x1b[?1049l" in text)
        code = self.process.wait(DEADLINE_S)
        assert self.echoes(), "the terminal is as it was"
        assert "Traceback" not in self.screen
        os.close(self._fd)
        os.close(self._child_fd)
        return code


@pytest.mark.parametrize("ending", [b"q", signal.SIGINT, signal.SIGTERM])
def test_it_is_live_in_a_terminal_until_a_key_or_a_signal(
    endpoint: str, node: ScriptedInference, ending: bytes | signal.Signals
) -> None:
    terminal = TopTerminal("-e", endpoint, "--interval", "0.1")
    first = terminal.read_until(lambda text: "absent" in text)
    assert "\x1b[?1049h" in first, "on the alternate screen"
    assert "L3" in first
    assert "q ends" in first
    node.stats.running_requests = 77
    terminal.read_until(lambda text: "77 running" in text)
    node.unary_errors = [Unavailable("Draining.")] * 5
    terminal.read_until(lambda text: "AWAY" in text)
    terminal.read_until(lambda text: "absent" in text and "AWAY" not in text.rpartition("promoe top")[2])
    terminal.press(b"m")
    terminal.read_until(lambda text: "absent" in text)
    terminal.press(b"m")
    terminal.read_until(lambda text: re.search("[▀▄]", text) is not None)
    if isinstance(ending, bytes):
        terminal.press(ending)
    else:
        terminal.process.send_signal(ending)
    assert terminal.end() == 0


def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/null").open() as nothing, StopSignals() as stop:
        monkeypatch.setattr(sys, "stdin", nothing)
        with Keyboard() as keyboard:
            assert keyboard.wait(0.01, stop) is None
            os.kill(os.getpid(), signal.SIGHUP)
            begin_s = time.perf_counter()
            assert keyboard.wait(DEADLINE_S, stop) is None
            assert time.perf_counter() - begin_s < DEADLINE_S / 2, "a signal wakes it"
