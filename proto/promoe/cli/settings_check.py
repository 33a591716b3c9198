"""Lets each service look at its settings before anything is packed, filled or loaded for them."""

import subprocess
from collections.abc import Sequence
from typing import Final

from promoe.cli.supervisor import ServiceCommand, launch_arguments
from promoe.errors import InternalError

_WRONG_SETTING: Final = 2


def check_settings(commands: Sequence[ServiceCommand]) -> None:
    """All at the same time, which takes a moment.

    Raises:
        ValueError: a setting is wrong; the first service's sentence.
    """
    asked = [(command, _start(command)) for command in commands if command.settings_module]
    said = [(command, process, process.communicate()[1].strip()) for command, process in asked]
    for command, process, sentence in said:
        if process.returncode == _WRONG_SETTING:
            raise ValueError(sentence)
        if process.returncode != 0:
            raise InternalError(f"{command.settings_module} ended with status {process.returncode}:\n{sentence}")


def _start(command: ServiceCommand) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        launch_arguments(command.settings_module, command.arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
