"""Starts the shadow's process, hands it its end of the feed, and reads its reports; for the service's own process."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from predictor_service.feed import Feed
from predictor_service.shadow.tally import ScoreReport
from promoe.errors import DeadlineExceeded, InternalError, ResourceExhausted
from promoe.log_format import log_format_in_use
from promoe.packet_channel import PacketChannel

logger = logging.getLogger(__name__)

_START_S: Final = 30.0
_END_S: Final = 5.0
_LONGEST_LINE: Final = 8 << 20


@dataclass(frozen=True)
class ShadowSource:
    """Where the process finds versions: the same pack and registry as its service."""

    pack: Path
    registry: Path | None


class ShadowProcess:
    """One process, from its start until `close`.

    Args:
        source: see ShadowSource.
        version: the candidate; empty where only the service's own hints are scored.
        feed: what it listens to.
        reported: is told of each report, on a thread of this object's.
        failed: is told once, with a sentence, when the process ends before it is closed; on the same thread.

    Raises:
        ResourceExhausted: it cannot be started.
        InternalError, DeadlineExceeded: it does not come to listen; the text says why.
    """

    def __init__(
        self,
        source: ShadowSource,
        version: str,
        feed: Feed,
        reported: Callable[["ShadowProcess", ScoreReport], None],
        failed: Callable[["ShadowProcess", str], None],
    ) -> None:
        self.version = version
        self._feed = feed
        self._reported = reported
        self._failed = failed
        self._closing = threading.Event()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reports, reports = socket.socketpair()
        self._packets = PacketChannel(here)
        try:
            with there, reports:
                self._process = _launch(source, version, there.fileno(), reports.fileno())
        except OSError as error:
            self._packets.close()
            self._reports.close()
            raise ResourceExhausted(f"A shadow's process cannot be started ({error.strerror}).") from error
        self._lines = self._reports.makefile("rb")
        self._await_listening()
        feed.add(self._packets)
        self._thread = threading.Thread(target=self._read, name="shadow", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """Ends it; closing twice is allowed."""
        self._closing.set()
        self._feed.remove(self._packets)
        self._await_end()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._lines.close()
        self._reports.close()
        self._packets.close()

    def _await_end(self) -> int:
        """Its exit status: it ends when its packets do, and is killed where it does not."""
        self._packets.shut_down()
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _await_listening(self) -> None:
        self._reports.settimeout(_START_S)
        try:
            first = _document(self._lines.readline(_LONGEST_LINE))
            problem = str(first.get("failed", "")) if first else "it ended at once; the log has the reason"
            slow = False
        except TimeoutError:
            problem, slow = f"it does not listen within {_START_S:g} s", True
        if not problem:
            self._reports.settimeout(None)
            return
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._reports.close()
        self._packets.close()
        kind = DeadlineExceeded if slow else InternalError
        raise kind(f"The shadow {self.version or 'of the active version'} cannot look on: {problem}")

    def _read(self) -> None:
        problem = ""
        while document := _document(self._lines.readline(_LONGEST_LINE)):
            if "failed" in document:
                problem = str(document["failed"])
                continue
            try:
                self._reported(self, ScoreReport.decode(document))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("A shadow's report cannot be understood: %s", error)
        if self._closing.is_set():
            return
        self._feed.remove(self._packets)
        status = self._await_end()
        problem = problem or f"its process ended with status {status}"
        logger.warning("The shadow %s looks on no more: %s", self.version, problem)
        self._failed(self, problem)


def _launch(source: ShadowSource, version: str, packets_fd: int, reports_fd: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "predictor_service.shadow", "--pack", os.fspath(source.pack)]
    if source.registry is not None:
        command += ["--registry", os.fspath(source.registry)]
    command += ["--version", version, "--packets-fd", str(packets_fd), "--reports-fd", str(reports_fd)]
    command += ["--log-format", log_format_in_use().value]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(packets_fd, reports_fd))


def _document(line: bytes) -> dict[str, object]:
    """Empty at the end, and for what is none."""
    try:
        document = json.loads(line) if line else {}
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
