"""The `promoe` command: its subcommands, and how their failures are told."""

import importlib.metadata
import sys
from typing import Annotated

import typer

from promoe.cli.chat import ChatFlags, chat
from promoe.cli.console import print_error
from promoe.cli.demo import DemoFlags, demo
from promoe.cli.doctor import DoctorFlags, doctor
from promoe.cli.generate import GenerateFlags, generate
from promoe.cli.options import takes
from promoe.cli.pack import PackFlags, pack
from promoe.cli.plan import PlanFlags, plan
from promoe.cli.predictor import make_predictor_app
from promoe.cli.status import StatusFlags, status
from promoe.cli.top import TopFlags, top
from promoe.cli.trace import make_trace_app
from promoe.cli.up import UpOptions, up
from promoe.errors import PromoeError
from promoe.transport import Unreachable


def make_app() -> typer.Typer:
    """The typer application."""
    app = typer.Typer(
        name="promoe",
        help="Serves Mixture-of-Experts language models that are larger than the GPU.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command()(takes(UpOptions)(up))
    app.command()(takes(GenerateFlags)(generate))
    app.command()(takes(ChatFlags)(chat))
    app.command()(takes(StatusFlags)(status))
    app.command()(takes(TopFlags)(top))
    app.command()(takes(PackFlags)(pack))
    app.command()(takes(PlanFlags)(plan))
    app.command()(takes(DemoFlags)(demo))
    app.command()(takes(DoctorFlags)(doctor))
    app.add_typer(make_trace_app())
    app.add_typer(make_predictor_app())
    return app


def main() -> None:
    """The console script: 0 done, 1 failed (one sentence on standard error), 2 wrong usage, 130 interrupted."""
    try:
        make_app()()
    except ValueError as error:
        print_error(error)
        sys.exit(2)
    except Unreachable as error:
        print_error(Unreachable(f"{error} Start the stack with `promoe up`, or name another node with --endpoint."))
        sys.exit(1)
    except (PromoeError, OSError) as error:
        print_error(error)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("promoe"))
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass
