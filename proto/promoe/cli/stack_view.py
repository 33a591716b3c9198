"""How a starting and running stack is shown: redrawn in place on a terminal, as plain lines elsewhere."""

import time
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_PLAIN_INTERVAL_S: Final = 5.0


class PhaseState(Enum):
    """Of one phase of the start."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class PhaseLine:
    """One phase.

    Attributes:
        name: `pack`, `fill`, `load`, `ready`, and `stop` once it stops.
        state: where it is.
        detail: one phrase.
        fraction: how much is done, where that is known.
    """

    name: str
    state: PhaseState = PhaseState.WAITING
    detail: str = ""
    fraction: float | None = None


@dataclass(frozen=True)
class StackStatus:
    """Everything that is shown.

    Attributes:
        phases: in order.
        footer: figures of the running stack.
    """

    phases: tuple[PhaseLine, ...]
    footer: str = ""


class StackView(Protocol):
    """Where a StackStatus is shown."""

    def show(self, status: StackStatus) -> None:
        """Shows it in place of the former one."""
        ...

    def note(self, text: str) -> None:
        """Says something that stays to be read."""
        ...

    def pause(self) -> None:
        """Leaves the terminal to somebody else until the next `show`."""
        ...

    def close(self) -> None:
        """Leaves the last status standing."""
        ...


class LiveView:
    """On a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._status = StackStatus(())
        self._spinner = Spinner("dots", style="cyan")

    def show(self, status: StackStatus) -> None:
        """See StackView."""
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()
        self._status = status
        self._live.update(self._render(status))

    def note(self, text: str) -> None:
        """See StackView."""
        self._console.print(Text(text, style="yellow"))

    def pause(self) -> None:
        """See StackView."""
        if self._live is not None:
            self._live.update(Text(""))
            self._live.transient = True
            self._live.stop()
            self._live = None
        for line in self._status.phases:
            if line.state is PhaseState.RUNNING:
                self._console.print(Text.assemble((line.name, "bold"), f"  {line.detail}"), soft_wrap=True)

    def close(self) -> None:
        """See StackView."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self, status: StackStatus) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(width=5)
        table.add_column()
        for line in status.phases:
            table.add_row(self._sign(line.state), Text(line.name, style="bold"), _detail(line))
        return Group(table, Text(status.footer, style="dim")) if status.footer else Group(table)

    def _sign(self, state: PhaseState) -> Spinner | Text:
        if state is PhaseState.RUNNING:
            return self._spinner
        sign, style = {
            PhaseState.WAITING: ("·", "dim"),
            PhaseState.DONE: ("✓", "green"),
            PhaseState.FAILED: ("✗", "red"),
        }[state]
        return Text(sign, style=style)


def _detail(line: PhaseLine) -> Table | Text:
    style = "dim" if line.state is PhaseState.WAITING else ""
    if line.fraction is None or line.state is not PhaseState.RUNNING:
        return Text(line.detail, style=style)
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=line.fraction, width=30), Text(line.detail))
    return row


class PlainView:
    """In a pipe or a log: a line when a phase changes, and now and then while it lasts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[PhaseState, float]] = {}

    def show(self, status: StackStatus) -> None:
        """See StackView."""
        for line in status.phases:
            state, shown_s = self._shown.get(line.name, (PhaseState.WAITING, 0.0))
            is_due = line.fraction is not None and time.perf_counter() - shown_s > _PLAIN_INTERVAL_S
            if line.state is not state or (line.state is PhaseState.RUNNING and is_due):
                self._shown[line.name] = (line.state, time.perf_counter())
                self._print(f"{line.name}: {line.detail or line.state.value}")

    def note(self, text: str) -> None:
        """See StackView."""
        self._print(text)

    def pause(self) -> None:
        """See StackView."""

    def close(self) -> None:
        """See StackView."""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def view_for(console: Console) -> StackView:
    """The view that suits the console."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)
