"""Makes a pack by running its steps one after the other, each on our terminal where it draws its own progress."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from promoe.cli.console import state_console
from promoe.cli.pack_cache import HOME_VARIABLE, PackPlan, ToolCommand, is_packed
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import launch_arguments
from promoe.errors import ResourceExhausted, Unavailable

_POLL_S: Final = 0.1
_STOP_DEADLINE_S: Final = 5.0


def make_pack(plan: PackPlan, stop: StopSignals) -> bool:
    """Runs the steps unless another promoe has just made the same pack.

    Returns:
        False when a signal came before the pack was there; what was done is kept.

    Raises:
        Unavailable: a step failed.
        ResourceExhausted: the folder of the packs cannot be written.
    """
    with _alone(plan.pack_dir.with_name(f"{plan.pack_dir.name}.lock"), stop) as is_alone:
        if not is_alone:
            return False
        if is_packed(plan.pack_dir):
            return True
        return all(run_step(step, stop) for step in plan.steps)


def run_step(step: ToolCommand, stop: StopSignals) -> bool:
    """Runs one to its end; False when a signal came before, Unavailable when it failed."""
    process = subprocess.Popen(
        launch_arguments(step.module, step.arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        while process.poll() is None:
            if stop.asked:
                return False
            stop.wait(_POLL_S)
    finally:
        if process.poll() is None:
            # The whole group: a step may have started pip.
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        # A progress bar hides the cursor, and one that was killed cannot bring it back.
        state_console().show_cursor()
    if process.returncode != 0:
        raise Unavailable(f"“{step.title}” failed with exit code {process.returncode}; what it said is above.")
    return True


@contextmanager
def _alone(path: Path, stop: StopSignals) -> Iterator[bool]:
    """Holds a lock file; gives False when a signal came while another process held it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ResourceExhausted(
            f"Packs cannot be kept in {path.parent} ({error.strerror}); set {HOME_VARIABLE} to a folder for them."
        ) from error
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if stop.asked:
                    yield False
                    return
                stop.wait(_POLL_S)
            else:
                yield True
                return
    finally:
        os.close(fd)
