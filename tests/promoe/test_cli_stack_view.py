"""What a starting stack looks like: on a terminal redrawn in place, elsewhere one line per change."""

import io

import pytest
from rich.console import Console

from promoe.cli.stack_view import LiveView, PhaseLine, PhaseState, PlainView, StackStatus, view_for


def status_with(*phases: PhaseLine, footer: str = "") -> StackStatus:
    return StackStatus(phases, footer)


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


def test_plain_lines_come_with_changes_only(written: io.StringIO) -> None:
    view = PlainView(Console(file=written))
    waiting = PhaseLine("load")
    for fraction in (0.1, 0.2, 0.3):
        view.show(status_with(PhaseLine("fill", PhaseState.RUNNING, f"{fraction:.0%} of it", fraction), waiting))
    view.note("The store [x] was killed.")
    view.show(status_with(PhaseLine("fill", PhaseState.DONE, "all of it"), waiting, footer="never shown"))
    view.show(status_with(PhaseLine("fill", PhaseState.DONE, "all of it"), waiting))
    view.show(status_with(PhaseLine("fill", PhaseState.DONE), PhaseLine("load", PhaseState.FAILED)))
    view.pause()
    view.close()
    assert written.getvalue().splitlines() == [
        "fill: 10% of it",
        "The store [x] was killed.",
        "fill: all of it",
        "load: failed",
    ]


def test_the_live_view_shows_every_phase_with_its_sign(written: io.StringIO) -> None:
    view = LiveView(Console(file=written, force_terminal=True, width=100))
    view.show(
        status_with(
            PhaseLine("pack", PhaseState.DONE, "demo"),
            PhaseLine("fill", PhaseState.RUNNING, "61 %", 0.61),
            PhaseLine("load", PhaseState.FAILED, "broken"),
            PhaseLine("ready"),
            footer="3 running",
        )
    )
    view.note("noted")
    view.close()
    screen = written.getvalue()
    for words in ("✓", "demo", "━", "61 %", "✗", "broken", "·", "ready", "3 running", "noted"):
        assert words in screen


def test_the_live_view_leaves_the_terminal_while_paused(written: io.StringIO) -> None:
    console = Console(file=written, force_terminal=True, width=100)
    view = LiveView(console)
    view.show(status_with(PhaseLine("pack", PhaseState.RUNNING, "packing")))
    view.pause()
    assert written.getvalue().endswith("pack\x1b[0m  packing\n")
    before = written.getvalue()
    console.print("the packer's own bar")
    assert written.getvalue().endswith("the packer's own bar\n")
    assert before.endswith("\x1b[?25h") or "\x1b[?25h" in before  # the cursor is back
    view.show(status_with(PhaseLine("pack", PhaseState.DONE, "packed")))
    view.close()
    assert "packed" in written.getvalue()


def test_the_view_suits_the_console(written: io.StringIO) -> None:
    assert isinstance(view_for(Console(file=written)), PlainView)
    assert isinstance(view_for(Console(file=written, force_terminal=True)), LiveView)
