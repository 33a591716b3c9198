"""Lets each service look at its settings before anything is packed, filled or loaded for them."""

import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import ServiceCommand, launch_arguments
from promoe.errors import EXIT_WRONG_SETTING, DeadlineExceeded, InternalError

_DEADLINE_S: Final = 60.0
_POLL_S: Final = 0.02


def check_all_settings(commands: Sequence[ServiceCommand], stop: StopSignals) -> bool:
    """All at the same time, which takes a second; False when a signal came before.

    Raises:
        ValueError: a setting is wrong; the first service's sentence.
        DeadlineExceeded: a service does not come to an end with it.
    """
    with ExitStack() as stack:
        checks = [stack.enter_context(_Check(command)) for command in commands if command.settings_module]
        until_s = time.perf_counter() + _DEADLINE_S
        for check in checks:
            while check.process.poll() is None:
                if stop.asked:
                    return False
                if time.perf_counter() > until_s:
                    raise DeadlineExceeded(f"{check.module} has not looked at its settings within {_DEADLINE_S:g} s.")
                stop.wait(_POLL_S)
        for check in checks:
            check.raise_what_it_found()
    return True


class _Check:
    """A running one; killed at the end of the block."""

    def __init__(self, command: ServiceCommand) -> None:
        self.module = command.settings_module
        self.process = subprocess.Popen(
            launch_arguments(self.module, command.arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for who watches over it
        )

    def raise_what_it_found(self) -> None:
        """Nothing when the settings can be."""
        assert self.process.stderr is not None, "asked for"
        sentence = self.process.stderr.read().strip()
        if self.process.returncode == EXIT_WRONG_SETTING:
            raise ValueError(sentence)
        if self.process.returncode != 0:
            raise InternalError(f"{self.module} ended with status {self.process.returncode}:\n{sentence}")

    def __enter__(self) -> "_Check":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
