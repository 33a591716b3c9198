"""People see a bar on a terminal and a line every ten percent elsewhere."""

import logging
import os
import pty
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from expert_store.fill_progress import FillProgress


def test_elsewhere_there_is_a_line_every_ten_percent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = FillProgress(5_000_000)
    for filled in range(0, 5_000_001, 10_000):
        progress.update(filled)
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"Filled {percent}% of 5.0 MB." for percent in range(10, 101, 10)
    ]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Standard error as a terminal; yields how to read what it shows, up to a text that must come."""
    controller, device = pty.openpty()
    with os.fdopen(device, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERM", "xterm")

        def shown(awaited: str) -> str:
            stream.flush()
            text = ""
            # The kernel hands a terminal's output over in pieces, and when it likes.
            while awaited not in text:
                assert select.select([controller], [], [], 20)[0], f"{awaited!r} came in 20 s, not only {text!r}"
                text += os.read(controller, 1 << 16).decode()
            return text

        yield shown
    os.close(controller)


def test_a_terminal_shows_a_bar_to_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with terminal(monkeypatch) as shown:
        progress = FillProgress(3 << 20)
        for filled in range(0, (3 << 20) + 1, 1 << 18):
            progress.update(filled)
        assert "Filling the arena" in shown("3.0/3.0 MiB")
        progress.close()
    assert caplog.records == []


def test_a_terminal_shows_nothing_when_nothing_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        FillProgress(3 << 20).close()
        sys.stderr.write("end")
        assert shown("end") == "end"
