"""People see a bar on a terminal and a line every ten percent elsewhere."""

import logging
import os
import pty
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
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error as a terminal; yields how to read what it shows."""
    controller, device = pty.openpty()
    os.set_blocking(controller, False)
    with os.fdopen(device, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERM", "xterm")

        def shown() -> str:
            stream.flush()
            try:
                return os.read(controller, 1 << 16).decode()
            except BlockingIOError:
                return ""

        yield shown
    os.close(controller)


def test_a_terminal_shows_a_bar_to_the_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with terminal(monkeypatch) as shown:
        progress = FillProgress(3 << 20)
        for filled in range(0, (3 << 20) + 1, 1 << 18):
            progress.update(filled)
        text = shown()
        assert "Filling the arena" in text
        assert "3.0/3.0 MiB" in text
        progress.close()
    assert caplog.records == []


def test_a_terminal_shows_nothing_when_nothing_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as shown:
        FillProgress(3 << 20).close()
        assert shown() == ""
