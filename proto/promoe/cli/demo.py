"""`promoe demo`: the demo model at half its experts, a few questions, and promoe beside ProMoE and reactive LRU."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from promoe.cli.console import output_console, state_console
from promoe.cli.contest import Ring, corners_up, plan_corner
from promoe.cli.demo_comparison import CONTESTANTS, Comparison, compare, emulated_link, summary
from promoe.cli.http_address import NO_HTTP
from promoe.cli.options import RunDirOption
from promoe.cli.run_dir import RunDir
from promoe.cli.stack import Stack
from promoe.cli.stack_plan import NO_PREDICTOR
from promoe.cli.stack_view import PlainView
from promoe.cli.stop_signals import StopSignals
from promoe.cli.up import UpOptions, brought_up
from promoe.client import Client
from promoe.errors import PromoeError

_QUESTIONS: Final = (
    "What is the capital of France?",
    "Why do leaves change their colour in autumn?",
    "Give me three facts about whales.",
)


@dataclass(frozen=True)
class DemoFlags:
    """The flags of `promoe demo`."""

    cache_rate: Annotated[float, typer.Option(help="Share of all experts that fits the device.")] = 0.5
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=2, help="Tokens of each answer at most.")] = 40
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None
    wheel: Annotated[Path | None, typer.Option(help="The demo model's base wheel, if it is already here.")] = None
    run_dir: RunDirOption = None


def demo(flags: DemoFlags) -> None:
    """Ask the demo model a few questions under promoe, ProMoE and reactive LRU side by side, and compare them."""
    with demo_folder() as folder, StopSignals() as stop:
        run_dir = RunDir(flags.run_dir or folder / "run")
        options = UpOptions(
            cache_rate=1.0,
            device=flags.device,
            listen=f"unix:{run_dir.path / 'node.sock'}",
            http=NO_HTTP,
            predictor=NO_PREDICTOR,
            demo_wheel=flags.wheel,
        )
        with brought_up(options.plan(run_dir), run_dir, PlainView(state_console()), stop) as stack:
            if stack is not None:
                comparison = _run(stack, run_dir, flags, stop)
                if comparison is not None:
                    output_console().print(summary(comparison), soft_wrap=True)
        if stop.asked:
            raise typer.Exit(130)


def _run(stack: Stack, run_dir: RunDir, flags: DemoFlags, stop: StopSignals) -> Comparison | None:
    """The stack's own node has every expert resident: it says how fast computing alone is. None after a signal."""
    with Client(stack.plan.endpoint) as resident:
        link = emulated_link(resident, stop)
        start = "Starting three nodes and two predictors on the same expert store …"
        state_console().print(f"\n{link.phrase}\n{start}", soft_wrap=True)
        settings = (f"compute.cache_rate={flags.cache_rate}", *link.settings)
        if flags.device is not None:
            settings = (*settings, f"compute.device={flags.device}")
        ring = Ring(stack.plan.pack, run_dir, settings)
        with corners_up({each: plan_corner(ring, each) for each in CONTESTANTS}, stop) as clients:
            if not clients:
                return None
            return compare(clients, resident, _QUESTIONS, flags.max_tokens, stop)


@contextmanager
def demo_folder() -> Iterator[Path]:
    """A run folder's place, with a short path: the demo may run beside a stack, and unix sockets allow 107 bytes.

    It is removed, unless services failed: then the error names the logs in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="promoe-demo-", dir="/tmp"))
    has_failed = False
    try:
        yield folder
    except PromoeError:
        has_failed = True
        raise
    finally:
        if not (has_failed and any(folder.rglob("*.log"))):
            shutil.rmtree(folder)
