"""A predictor service with plug-ins of others: slow ones, failing ones; and its own sudden or orderly end."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from promoe.errors import InternalError, Unavailable
from promoe.hint import Observation, RequestsEnded
from promoe.hint_wire import encode_requests_ended
from promoe.v1 import predictor_pb2 as pb
from tests.packs import write_synthetic_pack
from tests.plugin_folder import environment_with, install_plugins
from tests.running_predictor import PredictStream, RunningPredictor, one_token
from tests.running_store import wait_until

NUM_LAYERS = 4
QUEUE = 8


@pytest.fixture(scope="module")
def pack(module_socket_dir: Path) -> Path:
    write_synthetic_pack(module_socket_dir / "pack", layers=NUM_LAYERS)
    return module_socket_dir / "pack"


@pytest.fixture(scope="module")
def plugins(module_socket_dir: Path) -> Path:
    return install_plugins(module_socket_dir / "plugins")


Start: TypeAlias = Callable[[str], RunningPredictor]


@pytest.fixture(params=["grpc", "packets"])
def started(pack: Path, plugins: Path, socket_dir: Path, request: pytest.FixtureRequest) -> Start:
    """Starts a service with the named plug-in, which is talked to one way or the other."""

    def start(name: str) -> RunningPredictor:
        settings = (f"predictor.predictor={name}", f"predictor.max_queued_events={QUEUE}")
        environment = environment_with(plugins)
        return RunningPredictor(
            pack, socket_dir, *settings, environment=environment, packets=request.param == "packets"
        )

    return start


def numbered(number: int) -> Observation:
    """Observations of one layer that can be told apart."""
    return Observation(1, 0, (), number, None, ())


def receive_all(node: PredictStream) -> Iterator[pb.Hint]:
    try:
        while True:
            yield from node.receive().hints.hints
    except StopIteration:
        return


def test_a_plugin_of_another_distribution_is_found_by_its_entry_point(started: Start) -> None:
    with started("echo") as service:
        assert service.wait_until_serving().active.version == "echo@7"
        with service.node() as node:
            node.begin_step(1)
            node.observe(one_token(1, 3, [0, 1]))
            (hint,) = node.receive().hints.hints
            assert (hint.version, hint.layer, list(hint.experts)) == ("echo@7", 3, [0])


def test_an_overloaded_predictor_drops_the_oldest_and_answers_the_newest(started: Start) -> None:
    with started("slow") as service:
        service.wait_until_serving()
        with service.node() as node:
            node.begin_step(1)
            for number in range(1, 101):
                node.observe(numbered(number))
            node.finish()
            answered = [hint.num_expected for hint in receive_all(node)]
        stats = service.stats()
        assert answered == sorted(answered)
        # The beginning of the step, which is never dropped for an observation, may have had a place of its own.
        assert answered[1 - QUEUE :] == list(range(102 - QUEUE, 101)), "the newest wait"
        assert stats.dropped_observations == 100 - len(answered) > 0
        assert stats.observations == len(answered)


def test_a_failing_plugin_ends_its_session_and_never_the_service(started: Start) -> None:
    with started("failing") as service:
        service.wait_until_serving()
        with service.node("bystander") as bystander, service.node("victim") as victim:
            for node in (bystander, victim):
                node.begin_step(1)
                node.observe(one_token(1, 0, [0, 1]))
                assert node.receive().hints.hints
            victim.observe(one_token(1, 2, [0, 1]))
            with pytest.raises(InternalError, match=r"echo@7 failed \(ZeroDivisionError\)"):
                victim.receive()
            bystander.observe(one_token(1, 1, [0, 1]))
            assert bystander.receive().hints.hints
            # A plug-in's ValueError is its bug, not the node's bad input.
            bystander.send(pb.PredictRequest(requests_ended=encode_requests_ended(RequestsEnded(("poison",)))))
            with pytest.raises(InternalError, match=r"echo@7 failed \(ValueError\)"):
                bystander.receive()
        log = service.log.read_text()
        assert log.count("Traceback") == 2
        assert "the session of node victim ends" in log
        assert service.process.poll() is None


def test_sigterm_ends_the_streams_with_a_sentence_and_frees_the_socket(started: Start) -> None:
    with started("echo") as service:
        service.wait_until_serving()
        with service.node() as node:
            node.begin_step(1)
            begin_s = time.perf_counter()
            assert service.terminate() == 0
            assert time.perf_counter() - begin_s < 10
            with pytest.raises(Unavailable, match="shutting down"):
                node.receive()
        assert "Traceback" not in service.log.read_text()
    with started("none") as successor:
        assert successor.wait_until_serving().active.version == "none@1"


def test_a_stopped_predictor_goes_on_where_it_was_and_a_killed_one_is_gone(started: Start) -> None:
    with started("echo") as service:
        service.wait_until_serving()
        with service.node() as node:
            node.begin_step(1)
            service.process.send_signal(signal.SIGSTOP)
            node.observe(numbered(5))
            service.process.send_signal(signal.SIGCONT)
            assert node.receive().hints.hints[0].num_expected == 5
            service.kill()
            with pytest.raises(Unavailable):
                node.receive()


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        (["predictor.predictor=crystal"], 2, "'crystal'; installed: auto, echo, failing, frequency, gate_ahead,"),
        (["predictor.predictor=lost"], 2, "no_such_module:Echo cannot be loaded"),
        (["predictor.lookahead=3", "predictor.predictor=none"], 2, "none@1 predicts nothing"),
        (["predictor.predictor=oracle"], 1, "needs a recorded trace"),
        (["predictor.max_rows=0"], 2, "predictor.max_rows is 0; allowed: 1 to"),
        (["predictor.pack=/nowhere"], 1, "There is no folder /nowhere"),
        (["predictor.listen=unix:/dev/null/p.sock"], 2, "its folder cannot be made"),
        ([f"predictor.listen=unix:/tmp/{'x' * 120}"], 2, "longer than 107 bytes"),
        (["predictor.speed=9"], 2, "predictor.speed is not a setting; known in [predictor]: artifact,"),
        (["predictor.metrics_listen=nonsense"], 2, "expected host:port"),
    ],
)
def test_what_cannot_run_says_why_and_ends(
    pack: Path, plugins: Path, socket_dir: Path, settings: list[str], status: int, words: str
) -> None:
    with RunningPredictor(pack, socket_dir, *settings, environment=environment_with(plugins)) as service:
        assert service.process.wait(timeout=20) == status
        assert words in service.log.read_text()
        assert "Traceback" not in service.log.read_text()


def test_two_services_do_not_share_a_socket(started: Start, pack: Path, socket_dir: Path) -> None:
    with started("echo") as first:
        first.wait_until_serving()
        with RunningPredictor(pack, socket_dir) as second:
            assert second.process.wait(timeout=20) == 1
        wait_until(lambda: "Another process serves" in first.log.read_text())
        assert first.get_info().active.version == "echo@7"
