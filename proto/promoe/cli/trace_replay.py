"""`promoe trace replay`: repeats a recorded run or asks what other settings would have done, by becoming the replay."""

import os
import sys
from types import MappingProxyType
from typing import Final

import typer

PASS_THROUGH: Final = MappingProxyType(
    {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
"""The replay reads its own command line, `--help` included."""


def replay(context: typer.Context) -> None:
    """Repeat a recorded run exactly, or ask what other settings would have done (`--help` lists them)."""
    # It has its own messages and exit code: nothing may stand between it and the terminal.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "compute_node.replay", *context.args])
