"""Flags that several commands share, and commands whose flags are a frozen dataclass."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias, TypeVar

import typer

from promoe.cli.quantity import parse_bytes_per_s, parse_nbytes, parse_share

_Options = TypeVar("_Options")

RunDirOption: TypeAlias = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the stack's sockets, logs and state.")
]
EndpointOption: TypeAlias = Annotated[
    str | None, typer.Option("--endpoint", "-e", help="Compute node to talk to; default: the one running here.")
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print a JSON document instead of text.")]


def takes(options_type: type[_Options]) -> Callable[[Callable[[_Options], None]], Callable[..., None]]:
    """Makes a typer command of a function of one dataclass: its annotated fields are the command's parameters."""
    assert dataclasses.is_dataclass(options_type), f"{options_type} is not a dataclass"

    def decorate(function: Callable[[_Options], None]) -> Callable[..., None]:
        def command(**values: object) -> None:
            function(options_type(**values))

        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        command.__annotations__ = typing.get_type_hints(options_type, include_extras=True)
        command.__signature__ = inspect.signature(options_type)  # type: ignore[attr-defined]  # read by inspect
        return command

    return decorate


def size(text: str) -> int:
    """A parser of sizes for typer's options."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def rate(text: str) -> int:
    """A parser of rates for typer's options."""
    try:
        return parse_bytes_per_s(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def share(text: str) -> float:
    """A parser of parts of a whole for typer's options."""
    try:
        return parse_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
