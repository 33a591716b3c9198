"""`promoe generate`: one answer, streamed."""

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from promoe.cli.console import print_document, state_console
from promoe.cli.figures import answer_figures, usage_document
from promoe.cli.options import EndpointOption, JsonOption, RunDirOption
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.cli.sampling_options import SamplingFlags
from promoe.client import Client, GenerationStream
from promoe.errors import InvalidInput, PromoeError
from promoe.generation import Answer, Prompt


@dataclass(frozen=True)
class GenerateFlags(SamplingFlags):
    """The flags of `promoe generate`."""

    prompt: Annotated[str, typer.Argument(help="What to ask; `-` reads standard input.")] = "-"
    system: Annotated[str | None, typer.Option(help="System message before the question.")] = None
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the model's chat template.")] = False
    json_: JsonOption = False
    endpoint: EndpointOption = None
    run_dir: RunDirOption = None


def generate(flags: GenerateFlags) -> None:
    """Ask the running model one question and stream the answer."""
    text = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    if not text.strip():
        raise InvalidInput("The prompt is empty; write it behind `promoe generate` or into standard input.")
    endpoint = find_endpoint(flags.endpoint, RunDir(flags.run_dir))
    with Client(endpoint) as client, client.generate(_prompt(text, flags), **flags.generate_options()) as stream:
        if flags.json_:
            print_document(answer_document(stream.finish()))
        else:
            stream_answer(stream)


def _prompt(text: str, flags: GenerateFlags) -> Prompt:
    if flags.raw:
        if flags.system is not None:
            raise InvalidInput("--system needs the chat template; leave out --raw.")
        return text
    system = [{"role": "system", "content": flags.system}] if flags.system is not None else []
    return [*system, {"role": "user", "content": text}]


def stream_answer(stream: GenerationStream) -> None:
    """Text to standard output as it comes, the line of figures to standard error."""
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except (PromoeError, KeyboardInterrupt):
        # What is said next, and the shell's prompt, begin on a line of their own.
        if stream.text:
            sys.stdout.write("\n")
            sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stream.answer.usage is not None:
        state_console().print(answer_figures(stream.answer.usage), style="dim", soft_wrap=True)


def answer_document(answer: Answer) -> dict[str, object]:
    """The answer for machines."""
    return {
        "request_id": answer.request_id,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason.value if answer.finish_reason else None,
        "stop_string": answer.stop_string,
        "seed": answer.seed,
        "usage": usage_document(answer.usage) if answer.usage else None,
    }
