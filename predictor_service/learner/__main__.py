"""`python -m predictor_service.learner` is started by the predictor service, with two sockets, and ends with it.

The least important process of the host: niced down, one thread that computes. Exit status 0 when the service is gone,
1 when it cannot run, 2 for a wrong configuration.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

# Before numpy is imported: the other cores are those of the processes that serve.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

from predictor_service.config import PredictorConfig
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import ControlLines
from predictor_service.learner.process import LearnerProcess
from promoe.config import LogConfig, Settings
from promoe.errors import PromoeError, exit_status
from promoe.pack_manifest import PackManifest
from promoe.packet_channel import PacketChannel
from promoe.telemetry import configure_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m predictor_service.learner", description="Trains candidates from what a predictor service sees."
    )
    parser.add_argument("--config", type=Path, help="TOML file with a [predictor] and a [learner] table")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    parser.add_argument("--feed-fd", type=int, required=True, help="inherited packet socket: sessions' messages")
    parser.add_argument("--control-fd", type=int, required=True, help="inherited stream socket for commands")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where candidates are written")
    options = parser.parse_args(arguments)
    try:
        settings = Settings(options.config, options.set)
        predictor = settings.section("predictor", PredictorConfig)
        learner = settings.section("learner", LearnerConfig)
        log = settings.section("log", LogConfig)
        configure_logging("predictor_learner", log.level, log.format)
        feed = PacketChannel(socket.socket(fileno=options.feed_fd))
        control = ControlLines(socket.socket(fileno=options.control_fd))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"predictor_service.learner: {error}\n")
        return 2
    os.nice(learner.niceness)
    try:
        spec = PackManifest.read(predictor.pack).spec
        LearnerProcess(learner, spec, predictor.pack, options.out, feed, control).run()
    except PromoeError as error:
        sys.stderr.write(f"predictor_service.learner: {error}\n")
        return exit_status(error)
    return 0


if __name__ == "__main__":
    status = main()
    # At once: a training may be under way in a thread, inside of torch, which is not to be waited for.
    logging.shutdown()
    os._exit(status)
