"""The probe says what a service's health says, and by its exit status whether to use it."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from promoe.health_probe import main
from promoe.rpc import RpcServer


async def probe(endpoint: str) -> int:
    """In a thread, while the event loop answers."""
    return await asyncio.to_thread(main, [endpoint])


async def serve_and_probe(endpoint: str) -> tuple[int, int, int]:
    """Exit statuses while starting, while serving, and after the end of one server."""
    server = RpcServer(("promoe.test.Service",))
    server.listen(endpoint)
    await server.start()
    starting = await probe(endpoint)
    await server.set_serving(True)
    serving = await probe(endpoint)
    await server.stop(grace_s=0)
    return starting, serving, await probe(endpoint)


def test_only_a_service_that_serves_is_healthy(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"unix:{socket_dir / 'a.sock'}"
    assert asyncio.run(serve_and_probe(endpoint)) == (1, 0, 1)
    # gRPC's own complaints about several event loops in one process aside.
    starting, ended = (line for line in capsys.readouterr().err.splitlines() if endpoint in line)
    assert starting == f"{endpoint} answers, and is NOT_SERVING."
    assert ended.startswith(f"There is no connection to {endpoint}")


def test_a_service_that_does_not_answer_in_time_is_not_healthy(socket_dir: Path) -> None:
    assert main([f"unix:{socket_dir / 'none.sock'}", "--deadline-s", "0.2"]) == 1


def test_the_probe_is_a_module_that_is_run(socket_dir: Path) -> None:
    command = [sys.executable, "-P", "-m", "promoe.health_probe", f"unix:{socket_dir / 'none.sock'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "There is no connection to" in done.stderr
    assert "Traceback" not in done.stderr
