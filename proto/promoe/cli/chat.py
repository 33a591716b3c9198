"""`promoe chat`: a conversation with the running model."""

import sys
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from promoe.cli.console import print_error, state_console
from promoe.cli.generate import stream_answer
from promoe.cli.options import EndpointOption, RunDirOption
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.cli.sampling_options import SamplingFlags
from promoe.client import Client
from promoe.errors import PromoeError
from promoe.generation import GenerateOptions

_COMMANDS: Final = "/reset starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer."


@dataclass(frozen=True)
class ChatFlags(SamplingFlags):
    """The flags of `promoe chat`."""

    system: Annotated[str | None, typer.Option(help="System message at the beginning.")] = None
    endpoint: EndpointOption = None
    run_dir: RunDirOption = None


class Conversation:
    """The messages so far; a turn that failed leaves no trace in them."""

    def __init__(self, system: str | None) -> None:
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._opening)

    def ask(self, client: Client, text: str, options: GenerateOptions) -> None:
        """One turn: streams the answer and keeps it, also what there is of one that Ctrl-C stopped."""
        question = {"role": "user", "content": text}
        with client.generate([*self.messages, question], **options) as stream:
            try:
                stream_answer(stream)
            except KeyboardInterrupt:
                stream.cancel()
                sys.stdout.write("\n")
                state_console().print("(stopped)", style="dim")
            self.messages += [question, {"role": "assistant", "content": stream.text}]


def chat(flags: ChatFlags) -> None:
    """Talk with the running model. Works in a terminal and in a pipe (a question per line)."""
    options = flags.generate_options()
    conversation = Conversation(flags.system)
    with Client(find_endpoint(flags.endpoint, RunDir(flags.run_dir))) as client:
        model = client.info().model.name
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401 - gives input() line editing and history

            state_console().print(f"{model} · {_COMMANDS}", style="dim")
        while (text := _read_question(is_terminal)) is not None:
            if text in ("/quit", "/exit"):
                return
            if text == "/reset":
                conversation.reset()
                state_console().print("(a new conversation)", style="dim")
            elif text.startswith("/"):
                state_console().print(f"{text.split()[0]} is no command: {_COMMANDS}", style="yellow")
            elif text:
                _ask(conversation, client, text, options)


def _read_question(is_terminal: bool) -> str | None:
    """The next line, or None at the end. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            return (input("› ") if is_terminal else input()).strip()
        except EOFError:
            if is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()


def _ask(conversation: Conversation, client: Client, text: str, options: GenerateOptions) -> None:
    """In a terminal a failed turn is told and the conversation goes on; in a pipe it is the end."""
    try:
        conversation.ask(client, text, options)
    except PromoeError as error:
        if not sys.stdin.isatty():
            raise
        print_error(error)
