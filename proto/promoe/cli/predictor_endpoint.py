"""`promoe predictor connect`: another predictor service takes over from the one that a running node listens to."""

import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from promoe.cli.console import output_console
from promoe.cli.options import RunDirOption
from promoe.cli.predictor_versions import WhyOption
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.node_admin import NodeAdmin


@dataclass(frozen=True)
class ConnectFlags:
    """The flags of `promoe predictor connect`."""

    predictor: Annotated[
        str,
        typer.Argument(help="unix:PATH or host:port of the new service, as the node sees it.", metavar="ENDPOINT"),
    ]
    why: WhyOption = "asked for at the command line"
    node: Annotated[
        str | None,
        typer.Option("--node", "--endpoint", "-e", help="Compute node to tell; default: the one running here."),
    ] = None
    run_dir: RunDirOption = None


def connect(flags: ConnectFlags) -> None:
    """Let a node listen to another predictor service, while it serves.

    The service is opened beside the present one and must answer a handshake and, under load, a few steps with hints. If
    it fails within its first minute after that, the node goes back by itself.
    """
    endpoint = _absolute(flags.predictor)
    node = NodeAdmin(find_endpoint(flags.node, RunDir(flags.run_dir)))
    switch = node.connect_predictor(endpoint, getpass.getuser(), flags.why)
    if switch is None:
        output_console().print(f"The node at {node.endpoint} listens to {endpoint} already.", soft_wrap=True)
    else:
        before = f"; before it was {switch.before}" if switch.before else ""
        output_console().print(f"The node at {node.endpoint} listens to {switch.after} now{before}.", soft_wrap=True)


def _absolute(endpoint: str) -> str:
    """The node runs in another folder: a socket's path is meant as it is seen from here."""
    if not endpoint.startswith("unix:") or endpoint.startswith("unix:/"):
        return endpoint
    return f"unix:{Path(endpoint.removeprefix('unix:')).expanduser().absolute()}"
