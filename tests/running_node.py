"""Compute nodes for tests: a real process, or the same parts in this one where many models take turns."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from compute_node.call_naming import name_call
from compute_node.config import ComputeConfig
from compute_node.node import ComputeNode
from compute_node.service import SERVICE_NAME
from promoe import Client
from promoe.rpc import RpcServer
from promoe.v1 import inference_pb2_grpc
from tests.running_store import ROOT, wait_until

START_DEADLINE_S = 120.0


class RunningNode:
    """`python -m compute_node` on a free port; killed at the end of the `with` block.

    Args:
        folder: the log is `folder/NAME.log`.
        settings: further `compute.key=value` texts.
        config: a file of further ones, read again at SIGHUP.
    """

    def __init__(
        self,
        pack_dir: Path,
        store_endpoint: str,
        folder: Path,
        *settings: str,
        name: str = "node",
        config: Path | None = None,
    ) -> None:
        self.log = folder / f"{name}.log"
        arguments = [
            f"compute.pack={pack_dir}",
            f"compute.store_endpoint={store_endpoint}",
            "compute.listen=127.0.0.1:0",
            "compute.device=cpu",
            "compute.num_threads=1",
            *settings,
        ]
        command = [sys.executable, "-m", "compute_node", *(() if config is None else ("--config", str(config)))]
        for argument in arguments:
            command += ["--set", argument]
        with self.log.open("w") as log:
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

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def wait_for_exit(self, timeout_s: float = START_DEADLINE_S) -> tuple[int, str]:
        """The exit status and what the process said last."""
        status = self.process.wait(timeout_s)
        return status, self.log.read_text().strip().splitlines()[-1]

    def endpoint(self) -> str:
        """Where it serves; waits until it does."""
        pattern = re.compile(r"Serving .* at (127\.0\.0\.1:\d+)\.")

        def serving() -> bool:
            assert self.process.poll() is None, f"the node ended:\n{self.log.read_text()}"
            return pattern.search(self.log.read_text()) is not None

        wait_until(serving, START_DEADLINE_S, self.log)
        found = pattern.search(self.log.read_text())
        assert found is not None, "it was there a moment ago"
        return found.group(1)

    def http_url(self) -> str:
        """Where its HTTP API is, without `/v1`; waits until it serves."""
        self.endpoint()
        found = re.search(r"OpenAI-compatible API is at (\S+)/v1\.", self.log.read_text())
        assert found is not None, "it was started with compute.http_listen"
        return found.group(1)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the serving node."""
        with Client(self.endpoint()) as client:
            yield client


class NodeThread:
    """The parts of `python -m compute_node` on an event loop in a thread of this process."""

    def __init__(self, config: ComputeConfig) -> None:
        self.node = ComputeNode(config)
        self.endpoint = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(config,))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(START_DEADLINE_S), "the node is ready in time"
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(RuntimeError):  # a node that died has closed its loop
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, config: ComputeConfig) -> None:
        try:
            self._loop.run_until_complete(self._serve(config))
        except BaseException as failure:  # noqa: BLE001 - handed to the test
            self._failure = failure
            self._ready.set()
        finally:
            self._loop.close()

    async def _serve(self, config: ComputeConfig) -> None:
        server = RpcServer((SERVICE_NAME,), name_call)
        self.endpoint = server.listen("127.0.0.1:0")
        try:
            service = self.node.start(on_death=self._stop.set, loop=self._loop)
            inference_pb2_grpc.add_InferenceServicer_to_server(service, server.server)
            await server.start()
            await server.set_serving(True)
            self._ready.set()
            await self._stop.wait()
            await self.node.drain()
            await server.stop(grace_s=0)
        finally:
            self.node.close()
