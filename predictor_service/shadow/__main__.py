"""`python -m predictor_service.shadow`: runs a candidate on what a predictor service's nodes show, and scores both.

A child of the service, which gives it two descriptors: packets of the feed come on one, reports go out on the other, a
JSON document a line; the first one says that it listens. Ends when the service does, and gives way to everything else.
"""

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", "1")

from predictor_service.catalogue import Catalogue
from predictor_service.registry import Registry
from predictor_service.shadow.feed_client import Listener, read_packet
from promoe.config import SettingUnfit
from promoe.errors import InvalidInput, PromoeError, Unavailable
from promoe.log_format import LogFormat
from promoe.pack_manifest import PackManifest
from promoe.packet_channel import PacketChannel
from promoe.telemetry import configure_logging

logger = logging.getLogger("predictor_service.shadow")

REPORT_EVERY_S: Final = 0.25
_NICENESS: Final = 10


def listen(packets: PacketChannel, reports: socket.socket, listener: Listener) -> None:
    """Until the service hangs up."""
    _send(reports, {"listening": True})
    due_s = time.perf_counter() + REPORT_EVERY_S
    has_news = False
    while True:
        try:
            packet = packets.receive(max(0.001, due_s - time.perf_counter()) if has_news else None)
        except Unavailable:
            return
        except InvalidInput as error:  # larger than any message, as two together may be
            logger.debug("A packet is left out: %s", error)
            continue
        if packet is not None:
            has_news = True
            try:
                heard = read_packet(packet)
            except (PromoeError, ValueError) as error:
                logger.debug("A packet is left out: %s", error)
            else:
                # What the candidate raises here ends it, as it would end the sessions of a service that it serves.
                listener.hear(heard)
        if has_news and time.perf_counter() >= due_s:
            _send(reports, listener.report().encode())
            due_s, has_news = time.perf_counter() + REPORT_EVERY_S, False


def _send(reports: socket.socket, document: dict[str, object]) -> None:
    reports.sendall(json.dumps(document).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the service has hung up, 1 when the candidate cannot be had or fails."""
    parser = argparse.ArgumentParser(prog="python -m predictor_service.shadow", description=__doc__)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--version", default="", help="the candidate; without one the service's own hints are scored")
    parser.add_argument("--packets-fd", type=int, required=True)
    parser.add_argument("--reports-fd", type=int, required=True)
    parser.add_argument("--log-format", default=LogFormat.TEXT.value)
    options = parser.parse_args(arguments)
    configure_logging("predictor_service.shadow", "info", LogFormat(options.log_format))
    # The service says when it ends; a person's Ctrl-C is told to it, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    packets = PacketChannel(socket.socket(fileno=options.packets_fd))
    reports = socket.socket(fileno=options.reports_fd)
    threading.Thread(target=_end_with_service, args=(reports,), name="end", daemon=True).start()
    try:
        spec = PackManifest.read(options.pack).spec
        catalogue = Catalogue(spec, options.pack, Registry(options.registry) if options.registry else None)
        listener = Listener(catalogue.load(options.version) if options.version else None)
        listen(packets, reports, listener)
    except (PromoeError, SettingUnfit) as error:
        return _fail(reports, str(error))
    except OSError:  # the service is gone
        return 0
    except Exception as error:
        logger.error("The candidate failed.", exc_info=error)
        return _fail(reports, f"{options.version} failed ({type(error).__name__}); the log has the details.")
    return 0


def _end_with_service(reports: socket.socket) -> None:
    """Also while the candidate computes without end: a service that was killed ends nothing that hangs."""
    try:
        while reports.recv(1):
            continue
    except OSError:  # as good as the end
        pass
    os._exit(0)


def _fail(reports: socket.socket, reason: str) -> int:
    _send(reports, {"failed": reason})
    return 1


if __name__ == "__main__":
    sys.exit(main())
