"""`promoe predictor`: trains, measures and publishes predictors by becoming the tool that does it; asks a running
service for its versions, and tells a running node of another service.
"""

import os
import sys
from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NoReturn

import typer

from promoe.cli.options import takes
from promoe.cli.pack_cache import registry_folder
from promoe.cli.predictor_endpoint import ConnectFlags, connect
from promoe.cli.predictor_learn import LearnFlags, learn
from promoe.cli.predictor_versions import (
    ActivateFlags,
    HistoryFlags,
    ListFlags,
    RollbackFlags,
    ShadowFlags,
    activate,
    history,
    list_versions,
    rollback,
    shadow,
)
from promoe.cli.predictor_watch import WatchFlags, watch

TOOLS: Final = MappingProxyType(
    {
        "train": ("predictor_service.training", "Train a predictor from recorded traces."),
        "evaluate": ("predictor_service.evaluation", "Measure predictors on recorded traces."),
        "hints": ("predictor_service.hints", "Write a trace with the hints that a predictor would have given."),
        "publish": ("predictor_service.admin.publish", "Put a trained predictor into the registry."),
        "remove": ("predictor_service.admin.remove", "Take a version out of the registry."),
        "show": ("predictor_service.show", "Check a trained predictor's file and print what it says of itself."),
    }
)
"""Module and summary per subcommand."""

REGISTRY_TOOLS: Final = ("publish", "remove")
"""Those that are told where the registry is."""

_PASS_THROUGH: Final = MappingProxyType(
    {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
"""The tools read their own command lines, `--help` included."""


def make_predictor_app() -> typer.Typer:
    """The subcommands of `promoe predictor`."""
    app = typer.Typer(
        name="predictor",
        help="Train, measure and publish predictors, and choose which one makes the hints.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for name, (module, summary) in TOOLS.items():
        app.command(name, help=f"{summary} (--help lists the options)", context_settings=dict(_PASS_THROUGH))(
            _becoming(module, needs_registry=name in REGISTRY_TOOLS)
        )
    app.command("list")(takes(ListFlags)(list_versions))
    app.command("activate")(takes(ActivateFlags)(activate))
    app.command("shadow")(takes(ShadowFlags)(shadow))
    app.command("learn")(takes(LearnFlags)(learn))
    app.command("watch")(takes(WatchFlags)(watch))
    app.command("rollback")(takes(RollbackFlags)(rollback))
    app.command("history")(takes(HistoryFlags)(history))
    app.command("connect")(takes(ConnectFlags)(connect))
    return app


def tool_command(module: str, arguments: list[str]) -> list[str]:
    """The tool's command line."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _becoming(module: str, needs_registry: bool) -> Callable[[typer.Context], NoReturn]:
    def run(context: typer.Context) -> NoReturn:
        # What is said twice counts as it is said last: a folder that was asked for comes behind the default one.
        default = ["--registry", str(registry_folder())] if needs_registry else []
        # It has its own progress display, messages and exit code: nothing may stand between it and the terminal.
        command = tool_command(module, [*default, *context.args])
        os.execv(command[0], command)

    return run
