"""`promoe top`: the running node in the terminal, live."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live

from promoe.cli.console import output_console
from promoe.cli.heat_map import Drawing
from promoe.cli.keyboard import Keyboard
from promoe.cli.node_history import NodeHistory, NodeSample
from promoe.cli.options import EndpointOption, RunDirOption
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.cli.stop_signals import StopSignals
from promoe.cli.top_view import TopFrame, TopView
from promoe.client import Client
from promoe.errors import DeadlineExceeded, Overloaded, Unavailable
from promoe.retry import RetryPolicy

_DEADLINE_S: Final = 2.0
_KEYS: Final = "q ends · m draws the map otherwise: by signs, by colours"
_ONCE: Final = RetryPolicy(max_attempts=1)
_NOT_NOW: Final = (Unavailable, Overloaded, DeadlineExceeded)


@dataclass(frozen=True)
class TopFlags:
    """The flags of `promoe top`."""

    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0
    once: Annotated[bool, typer.Option("--once", help="Look twice, print one picture, and end.")] = False
    drawing: Annotated[Drawing | None, typer.Option(help="How the map is drawn; default: what suits the terminal.")] = (
        None
    )
    svg: Annotated[Path | None, typer.Option(help="With --once: write the picture to this file, too.")] = None
    endpoint: EndpointOption = None
    run_dir: RunDirOption = None


class NodeWatch:
    """Looks at one node again and again; it may go and come back."""

    def __init__(self, endpoint: str, client: Client) -> None:
        self._endpoint = endpoint
        self._client = client
        self._history = NodeHistory()
        self._away_since_s: float | None = None
        self._trouble = ""

    def look(self) -> None:
        """Asks it once; a node that does not answer is away, nothing else."""
        try:
            self._history.add(self._ask())
        except _NOT_NOW as error:
            self._trouble = str(error)
            self._away_since_s = self._away_since_s or time.perf_counter()
        else:
            self._away_since_s = None

    def require(self) -> None:
        """Asks it once; raises what kept it from answering."""
        self._history.add(self._ask())

    def frame(self, drawing: Drawing | None) -> TopFrame:
        """What is known now."""
        away_s = None if self._away_since_s is None else time.perf_counter() - self._away_since_s
        last, lately = self._history.last, self._history.lately()
        return TopFrame(self._endpoint, last, lately, away_s, self._trouble, drawing)

    def _ask(self) -> NodeSample:
        client = self._client
        info = client.info(deadline_s=_DEADLINE_S)
        stats = client.cache_stats(deadline_s=_DEADLINE_S)
        cache_map = client.cache_map(deadline_s=_DEADLINE_S)
        return NodeSample(time.perf_counter(), info, stats, cache_map)


def top(flags: TopFlags) -> None:
    """Show the running node live: expert cache, rates, predictions, link. `q` or Ctrl-C ends, `m` changes the map."""
    console = output_console()
    endpoint = find_endpoint(flags.endpoint, RunDir(flags.run_dir))
    with StopSignals() as stop, Client(endpoint, _ONCE) as client:
        watch = NodeWatch(endpoint, client)
        if flags.once or flags.svg or not console.is_terminal:
            _show_once(watch, flags, console, stop)
        else:
            _show_live(watch, flags, console, stop)


def _show_once(watch: NodeWatch, flags: TopFlags, console: Console, stop: StopSignals) -> None:
    watch.require()
    stop.wait(flags.interval)
    watch.require()
    view = TopView(watch.frame(flags.drawing))
    console.print(view)
    if flags.svg is not None:
        _save_picture(view, flags.svg, console)


def _save_picture(view: TopView, path: Path, console: Console) -> None:
    """As a terminal of the same size would show it, in colours."""
    with Path("/dev/null").open("w") as nowhere:
        picture = Console(
            record=True, file=nowhere, width=console.width, height=console.height, force_terminal=True,
            color_system="truecolor", no_color=False,
        )  # fmt: skip
        picture.print(view)
        picture.save_svg(str(path), title="promoe top")


def _show_live(watch: NodeWatch, flags: TopFlags, console: Console, stop: StopSignals) -> None:
    drawings = [flags.drawing, *(drawing for drawing in (*Drawing, None) if drawing is not flags.drawing)]
    watch.look()
    with Keyboard() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while not stop.asked:
            live.update(TopView(replace(watch.frame(drawings[0]), keys=_KEYS)), refresh=True)
            key = keyboard.wait(flags.interval, stop)
            if key == "q":
                return
            if key == "m":
                drawings.append(drawings.pop(0))
            else:
                watch.look()
