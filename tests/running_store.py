"""A real expert store process for tests, and what one can see of it from outside."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from promoe.errors import Unavailable
from promoe.rpc import CHANNEL_OPTIONS, domain_error
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parent.parent


class RunningStore:
    """`python -m expert_store`, started at construction; killed at the end of the `with` block.

    Args:
        folder: the run folder is `folder/run`, the log `folder/store.log` (appended).
        settings: further `store.key=value` texts.
    """

    def __init__(self, pack_dir: Path, folder: Path, *settings: str) -> None:
        self.run_dir = folder / "run"
        self.log = folder / "store.log"
        self.fd_socket = self.run_dir / "arena.sock"
        self.endpoint = f"unix:{self.run_dir / 'store.sock'}"
        arguments = [f"store.pack={pack_dir}", f"store.run_dir={self.run_dir}", *settings]
        command = [sys.executable, "-m", "expert_store"]
        for argument in arguments:
            command += ["--set", argument]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self.process.kill()
        self.process.wait(timeout=20)

    def terminate(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def get_info(self) -> pb.ExpertStoreGetInfoResponse:
        """Raises Unavailable while the store does not listen yet."""
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            try:
                return pb_grpc.ExpertStoreStub(channel).GetInfo(pb.ExpertStoreGetInfoRequest(), timeout=5)
            except grpc.RpcError as error:
                raise domain_error(error) from error

    def stats(self) -> pb.ExpertStoreStatsResponse:
        """The store's own figures."""
        with grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS) as channel:
            return pb_grpc.ExpertStoreStub(channel).Stats(pb.ExpertStoreStatsRequest(), timeout=5)

    def wait_until_full(self, timeout_s: float = 20.0) -> pb.ExpertStoreGetInfoResponse:
        """Returns when every expert is published."""
        wait_until(lambda: self._fill_state() == pb.FILL_STATE_FULL, timeout_s, self.log)
        return self.get_info()

    def wait_until_serving(self, timeout_s: float = 20.0) -> pb.ExpertStoreGetInfoResponse:
        """Returns when GetInfo answers, in whatever state."""
        wait_until(lambda: self._fill_state() is not None, timeout_s, self.log)
        return self.get_info()

    def _fill_state(self) -> int | None:
        assert self.process.poll() is None, f"the store ended:\n{self.log.read_text()}"
        try:
            return self.get_info().fill_state
        except Unavailable:
            return None


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0, log: Path | None = None) -> None:
    """Asks again and again until the condition holds; fails, with the log, when it does not in time."""
    deadline = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < deadline, log.read_text() if log and log.exists() else "it never came"
        time.sleep(0.01)
