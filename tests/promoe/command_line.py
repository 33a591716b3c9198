"""Runs the console script's function in this process; nothing is found of a stack that may run here."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from promoe.cli.app import main


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


class CommandLine:
    """`run("status", "--json")` is `promoe status --json` in a terminal of 200 columns that is a pipe."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("PROMOE_RUN_DIR", str(folder / "run"))
        monkeypatch.setenv("PROMOE_HOME", str(folder / "home"))
        monkeypatch.delenv("PROMOE_ENDPOINT", raising=False)
        monkeypatch.setenv("COLUMNS", "200")
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: str, stdin: str = "") -> Ran:
        """The exit code and what was written; a traceback fails the test."""
        self._monkeypatch.setattr(sys, "argv", ["promoe", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        written = self._capsys.readouterr()
        assert isinstance(code, int | None)
        assert "Traceback" not in written.err
        return Ran(code or 0, written.out, written.err)
