"""`promoe trace record`: a trace of the running node, while it serves."""

import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.status import Status

from promoe.cli.console import state_console
from promoe.cli.options import EndpointOption, RunDirOption
from promoe.cli.prompt_source import PACKAGED, PromptSender, read_prompts
from promoe.cli.quantity import format_nbytes, format_s
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.cli.stop_signals import StopSignals
from promoe.client import Client
from promoe.errors import InvalidInput
from promoe.generation import GenerateOptions

if TYPE_CHECKING:
    # Arrow and numpy: no other command is to wait for them.
    from promoe.cli.trace_recording import RecordingState, TraceRecording

_DEFAULT_ROWS: Final = 32
_LOOK_S: Final = 0.1
_SETTLED_S: Final = 1.5
"""The last steps of the last answer have come when nothing came for so long: a node sends a few together."""


@dataclass(frozen=True)
class RecordFlags:
    """The flags of `promoe trace record`."""

    out: Annotated[Path, typer.Argument(help="The trace file; replaced when it exists.")]
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help=f"Hidden states of so many tokens of each step (default {_DEFAULT_ROWS})."),
    ] = None
    layer_input: Annotated[bool, typer.Option("--layer-input", help="Record the inputs of the decoder layers.")] = False
    router_input: Annotated[bool, typer.Option("--router-input", help="Record what the routers read.")] = False
    seconds: Annotated[float | None, typer.Option(min=0, help="End after so long; default: Ctrl-C.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps.")] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"Send prompts meanwhile, and end when they are answered: a file with one per line, a folder of text "
            f"documents, or {PACKAGED!r} for the questions that come with promoe."
        ),
    ] = None
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Send only so many of them.")] = None
    at_once: Annotated[int, typer.Option(min=1, help="Send so many at a time.")] = 1
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens of each answer at most.")] = 128
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="Of the answers; 0 is greedy.")] = 0.7
    endpoint: EndpointOption = None
    run_dir: RunDirOption = None

    @property
    def max_rows(self) -> int:
        """For the node. Raises ValueError for rows of nothing."""
        if self.layer_input or self.router_input:
            return self.rows or _DEFAULT_ROWS
        if self.rows is not None:
            raise ValueError(
                f"--rows is {self.rows}, but no hidden states are asked for: --layer-input, --router-input"
            )
        return 0


def record(flags: RecordFlags) -> None:
    """Record what the expert cache is told (routing, loads, hints, times) and, if asked, hidden states."""
    from promoe.cli.trace_recording import TraceRecording

    max_rows = flags.max_rows
    items = read_prompts(flags.prompts)[: flags.num_prompts] if flags.prompts is not None else []
    began_s = time.perf_counter()
    with ExitStack() as cleanup:
        client = cleanup.enter_context(Client(find_endpoint(flags.endpoint, RunDir(flags.run_dir))))
        stop = cleanup.enter_context(StopSignals())
        stream = client.trace(max_rows=max_rows, layer_input=flags.layer_input, router_input=flags.router_input)
        recording = TraceRecording(stream, flags.out)
        recording.start()
        cleanup.callback(recording.close)
        sender = None
        if flags.prompts is not None:
            options = GenerateOptions(max_tokens=flags.max_tokens, temperature=flags.temperature)
            sender = cleanup.enter_context(closing(PromptSender(client, items, options, flags.at_once)))
            sender.start()
        console = state_console()
        with console.status("waiting for the first step") if console.is_terminal else nullcontext() as status:
            _watch(flags, recording, sender, stop, status)
    state = recording.finish()
    if state.steps == 0:
        raise InvalidInput(
            f"Nothing was recorded: no step was computed. Send requests meanwhile, or let --prompts {PACKAGED} do it."
        )
    console.print(f"{_state_phrase(state, time.perf_counter() - began_s)} → {flags.out}", soft_wrap=True)
    if state.dropped_steps:
        console.print("A trace with gaps can be learned from, but not replayed.", style="yellow", soft_wrap=True)


def _watch(
    flags: RecordFlags,
    recording: "TraceRecording",
    sender: PromptSender | None,
    stop: StopSignals,
    status: Status | None,
) -> None:
    """Shows the progress until it is time to end."""
    began_s = changed_s = time.perf_counter()
    seen = recording.state
    while not (stop.asked or recording.is_over):
        stop.wait(_LOOK_S)
        now_s, state = time.perf_counter(), recording.state
        if state != seen:
            seen, changed_s = state, now_s
        if status is not None and state.steps:
            status.update(_state_phrase(state, now_s - began_s))
        if flags.seconds is not None and now_s - began_s >= flags.seconds:
            return
        if flags.steps is not None and state.steps >= flags.steps:
            return
        if sender is not None and sender.is_through and now_s - changed_s >= _SETTLED_S:
            return


def _state_phrase(state: "RecordingState", elapsed_s: float) -> str:
    return (
        f"{state.steps} steps, {state.tokens} tokens of {state.requests} requests in {format_s(elapsed_s)} · "
        f"{format_nbytes(state.nbytes)} · {state.dropped_steps} steps left out"
    )
