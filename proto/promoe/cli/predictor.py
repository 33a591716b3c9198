"""`promoe predictor`: trains, measures and shows predictors by becoming the tool that does it."""

import os
import sys
from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NoReturn

import typer

TOOLS: Final = MappingProxyType(
    {
        "train": ("predictor_service.training", "Train a predictor from recorded traces."),
        "evaluate": ("predictor_service.evaluation", "Measure predictors on recorded traces."),
        "hints": ("predictor_service.hints", "Write a trace with the hints that a predictor would have given."),
        "show": ("predictor_service.show", "Check a trained predictor's file and print what it says of itself."),
    }
)
"""Module and summary per subcommand."""

_PASS_THROUGH: Final = MappingProxyType(
    {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
"""The tools read their own command lines, `--help` included."""


def make_predictor_app() -> typer.Typer:
    """The subcommands of `promoe predictor`."""
    app = typer.Typer(
        name="predictor",
        help="Train, measure and show predictors.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for name, (module, summary) in TOOLS.items():
        app.command(name, help=f"{summary} (--help lists the options)", context_settings=dict(_PASS_THROUGH))(
            _becoming(module)
        )
    return app


def tool_command(module: str, arguments: list[str]) -> list[str]:
    """The tool's command line."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _becoming(module: str) -> Callable[[typer.Context], NoReturn]:
    def run(context: typer.Context) -> NoReturn:
        # It has its own progress display, messages and exit code: nothing may stand between it and the terminal.
        command = tool_command(module, context.args)
        os.execv(command[0], command)

    return run
