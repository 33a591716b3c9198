"""`promoe demo`: the stack on the demo model at half its experts, two questions, and the figures."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from promoe.cli.console import output_console, state_console
from promoe.cli.figures import answer_figures
from promoe.cli.options import RunDirOption
from promoe.cli.quantity import format_nbytes, format_rate, format_s
from promoe.cli.run_dir import RunDir
from promoe.cli.stack import ready_phrase
from promoe.cli.stack_view import PlainView
from promoe.cli.stop_signals import StopSignals
from promoe.cli.up import UpOptions, brought_up
from promoe.client import Client
from promoe.errors import InternalError, PromoeError
from promoe.generation import FinishReason, Usage

_QUESTIONS: Final = ("What is the capital of France?", "Why do leaves change their colour in autumn?")
_ANSWER_DEADLINE_S: Final = 600.0


@dataclass(frozen=True)
class DemoFlags:
    """The flags of `promoe demo`."""

    cache_rate: Annotated[float, typer.Option(help="Share of all experts that fits the device.")] = 0.5
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of each answer at most.")] = 80
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None
    wheel: Annotated[Path | None, typer.Option(help="The demo model's base wheel, if it is already here.")] = None
    run_dir: RunDirOption = None


def demo(flags: DemoFlags) -> None:
    """Start everything on the demo model, ask two questions, print the figures, stop everything."""
    with demo_folder() as folder, StopSignals() as stop:
        run_dir = RunDir(flags.run_dir or folder / "run")
        options = UpOptions(
            cache_rate=flags.cache_rate,
            device=flags.device,
            listen=f"unix:{run_dir.path / 'node.sock'}",
            demo_wheel=flags.wheel,
        )
        with brought_up(options.plan(run_dir), run_dir, PlainView(state_console()), stop) as stack:
            if stack is not None:
                with Client(stack.plan.endpoint) as client:
                    usages = [ask_question(client, question, flags.max_tokens, stop) for question in _QUESTIONS]
                    _print_summary(client, usages)
        if stop.asked:
            raise typer.Exit(130)


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


def ask_question(client: Client, question: str, max_tokens: int, stop: StopSignals) -> Usage:
    """Streams one answer; raises InternalError when it is not what an answer must be."""
    output_console().print(f"\n[bold]{question}[/bold]")
    messages = [{"role": "user", "content": question}]
    with client.generate(messages, max_tokens=max_tokens, deadline_s=_ANSWER_DEADLINE_S) as stream:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
            if stop.asked:
                raise typer.Exit(130)
    sys.stdout.write("\n")
    sys.stdout.flush()
    answer = stream.answer
    if answer.usage is None or answer.finish_reason in (None, FinishReason.UNSPECIFIED):
        raise InternalError(f"The answer to {question!r} did not end properly.")
    if not answer.text.strip():
        raise InternalError(f"The answer to {question!r} is empty.")
    if answer.usage.decode.hit_rate is None:
        raise InternalError("The node counted no expert accesses: its expert cache was not used.")
    output_console().print(answer_figures(answer.usage), style="dim", soft_wrap=True)
    return answer.usage


def _print_summary(client: Client, usages: list[Usage]) -> None:
    stats = client.cache_stats()
    info = client.info()
    tpots = [usage.tpot_s for usage in usages if usage.tpot_s is not None]
    console = output_console()
    console.print(f"\n[bold]promoe demo[/bold] · {ready_phrase('unix socket', info)}", soft_wrap=True)
    console.print(
        f"hit rate decode {format_rate(stats.decode.hit_rate)}, prefill {format_rate(stats.prefill.hit_rate)} · "
        f"TTFT {format_s(sum(usage.ttft_s for usage in usages) / len(usages))} · "
        f"TPOT {format_s(sum(tpots) / len(tpots)) if tpots else '–'} · "
        f"{format_nbytes(stats.uploaded_bytes)} of experts moved",
        soft_wrap=True,
    )
