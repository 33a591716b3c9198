"""Nodes side by side: what their command lines say, and how scripted ones start and stop together."""

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from promoe.cli.contest import Contestant, Corner, Ring, corners_up, plan_corner
from promoe.cli.pack_cache import PackPlan
from promoe.cli.run_dir import RunDir
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import ServiceCommand
from promoe.config import Settings
from promoe.errors import Unavailable
from tests.running_store import wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVICES = "tests.promoe.scripted_services"
ALONE = Contestant("alone", "lru")
HINTED = Contestant("hinted", "proactive", "learned")


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield RunDir(Path(folder))
    left = [child for child in psutil.Process().children(recursive=True) if SERVICES in " ".join(child.cmdline())]
    assert not left


def settings_of(command: ServiceCommand) -> Settings:
    assert set(command.arguments[::2]) == {"--set"}
    return Settings(None, command.arguments[1::2])


def test_a_corner_is_a_node_of_its_own_on_the_shared_store(run_dir: RunDir) -> None:
    ring = Ring(PackPlan("demo", Path("/packs/demo"), ()), run_dir, ("compute.cache_rate=0.5",))
    alone, hinted = (plan_corner(ring, contestant) for contestant in (ALONE, HINTED))
    assert alone.predictor is None
    assert hinted.predictor is not None
    assert alone.endpoint != hinted.endpoint
    for contestant, corner in ((ALONE, alone), (HINTED, hinted)):
        asked = settings_of(corner.node)
        assert asked.asked("compute", "store_endpoint", str) == run_dir.store_endpoint
        assert asked.asked("compute", "pack", str) == "/packs/demo"
        assert asked.asked("compute", "policy", str) == contestant.policy
        assert asked.asked("compute", "cache_rate", float) == 0.5
        assert asked.asked("compute", "listen", str) == corner.endpoint
        assert Path(corner.endpoint.removeprefix("unix:")).parent.is_dir()
    predictor = settings_of(hinted.predictor)
    assert predictor.asked("predictor", "predictor", str) == "learned"
    assert predictor.asked("predictor", "listen", str) == settings_of(hinted.node).asked(
        "compute", "predictor_endpoint", str
    )


def scripted(run_dir: RunDir, contestant: Contestant, *manners: str, module: str = SERVICES) -> Corner:
    """A corner without a model; its predictor only lives, the node says whether it is connected."""
    folder = run_dir.path / contestant.policy
    folder.mkdir(exist_ok=True)
    endpoint = f"unix:{folder}/node.sock"
    node = ServiceCommand("compute node", module, ("node", endpoint, *manners), folder / "node.log", 20.0)
    if contestant is ALONE:
        return Corner(endpoint, node, None)
    predictor = ServiceCommand("predictor", SERVICES, ("predictor", f"unix:{folder}/p"), folder / "p.log", 20.0)
    return Corner(endpoint, node, predictor)


def test_all_serve_and_all_stop_by_themselves(run_dir: RunDir) -> None:
    corners = {ALONE: scripted(run_dir, ALONE), HINTED: scripted(run_dir, HINTED, "predicted")}
    with StopSignals() as stop, corners_up(corners, stop) as clients:
        assert [clients[contestant].complete("x").text for contestant in corners] == ["Hello", "Hello"]
        assert clients[HINTED].info().predictor.active is not None
        # That is what its node says: the predictor itself may not be ready to hear a signal.
        wait_until(lambda: b"predictor" in (run_dir.path / "proactive" / "p.log").read_bytes())
    assert (run_dir.path / "lru" / "stopped.txt").read_text().split() == ["node"]
    assert sorted((run_dir.path / "proactive" / "stopped.txt").read_text().split()) == ["node", "predictor"]


def test_one_that_ends_ends_all_with_its_last_words(run_dir: RunDir) -> None:
    corners = {ALONE: scripted(run_dir, ALONE), HINTED: scripted(run_dir, HINTED, module="tests.promoe.no_such_module")}
    with StopSignals() as stop, pytest.raises(Unavailable, match="no_such_module"), corners_up(corners, stop):
        pytest.fail("it never serves")


def test_a_signal_while_they_start_gives_nobody(run_dir: RunDir) -> None:
    # Its predictor never connects, so that only the signal ends the wait.
    corners = {HINTED: scripted(run_dir, HINTED)}
    with StopSignals() as stop:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), 2))
        timer.start()
        with corners_up(corners, stop) as clients:
            assert clients == {}
        timer.join()
        assert stop.asked
