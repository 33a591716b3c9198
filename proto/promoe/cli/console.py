"""Where the CLI writes: answers and documents to standard output, everything else to standard error."""

import json
import sys
from enum import Enum

from rich.console import Console
from rich.text import Text


def output_console() -> Console:
    """Standard output. Made when it is used, so that it is the one of this moment."""
    return Console(file=sys.stdout, highlight=False)


def state_console() -> Console:
    """Standard error."""
    return Console(file=sys.stderr, highlight=False)


def print_document(document: object) -> None:
    """JSON on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else str(value)


def print_error(error: Exception) -> None:
    """One sentence, with the mend where there is one, on standard error."""
    sentence = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        sentence = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    state_console().print(Text.assemble(("error: ", "bold red"), sentence), soft_wrap=True)
