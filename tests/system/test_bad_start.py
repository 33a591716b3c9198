"""A compute node that cannot start says in one sentence what is in the way, and leaves with a status that tells whose
mistake it is: 2 for a setting, 3 for a damaged pack, 1 for the world around it.
"""

import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from compute_node.__main__ import main
from promoe.pack_manifest import DENSE_FOLDER, PackManifest
from tests.running_node import RunningNode
from tests.running_store import RunningStore, wait_until
from tests.system.tiny_stack import pack_tiny_model

Start = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def store(tiny_pack: Path, module_socket_dir: Path) -> Iterator[RunningStore]:
    with RunningStore(tiny_pack, module_socket_dir) as running:
        running.wait_until_full()
        yield running


POLLER_NOISE = re.compile(r"^Exception in callback PollerCompletionQueue\..*?^BlockingIOError[^\n]*\n", re.M | re.S)
"""gRPC's aio poller is one for all event loops of a process, and may wake the wrong one: of no effect, and only in a
process that, like this one, has had several loops."""


@pytest.fixture
def start(tiny_pack: Path, store: RunningStore, capfd: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """`python -m compute_node` without the seconds that a new interpreter takes: its status and its last line."""

    def run(*settings: str) -> tuple[int, str]:
        asked = {
            "compute.pack": str(tiny_pack),
            "compute.store_endpoint": store.endpoint,
            "compute.listen": "127.0.0.1:0",
            "compute.device": "cpu",
            **dict(setting.split("=", 1) for setting in settings),
        }
        arguments = [part for key, value in asked.items() for part in ("--set", f"{key}={value}")]
        status = main(arguments)
        text = POLLER_NOISE.sub("", capfd.readouterr().err)
        assert "Traceback" not in text, text
        return status, text.strip().splitlines()[-1]

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("compute.cache_rat=0.5",),
            "compute.cache_rat is not a setting; known in [compute]: attach_deadline_s, cache",
        ),
        (("compute.cache_rate=0",), "compute.cache_rate is 0.0; allowed: above 0, up to 1"),
        (("compute.cache_rate=nan",), "compute.cache_rate is nan; allowed: above 0, up to 1"),
        (("compute.cache_rate=half",), "compute.cache_rate is 'half'; expected float"),
        (("compute.cache_rate=0.5", "compute.expert_slots=4"), "say the same thing; give one of them"),
        (("compute.device=tpu",), "compute.device is 'tpu'; allowed: auto, cuda, cpu"),
        (("compute.eviction=random",), "compute.eviction is 'random'; allowed: "),
        (("compute.cache_rate=0.01",), "0.01; the smallest for 8 experts per layer is 0.1250, one slot"),
        (("compute.expert_slots=9",), "compute.expert_slots is 9; allowed: 1 to 8, experts per layer"),
        (("compute.metrics_listen=nowhere",), "compute.metrics_listen is 'nowhere'; expected host:port"),
        (("log.level=loud",), "log.level is 'loud'; allowed: debug, info, warning, error"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_setting_that_cannot_be_ends_with_status_2(settings: tuple[str, ...], sentence: str, start: Start) -> None:
    status, line = start(*settings)
    assert status == 2, line
    assert line.startswith("compute_node: ")
    assert sentence in line


def test_no_memory_for_what_was_asked_names_the_number_and_the_flags(start: Start) -> None:
    status, line = start("compute.cache_rate=1.0", "compute.memory_bytes=1500000")
    assert status == 1
    assert "8 expert slots per layer need" in line
    assert " short. Lower --cache-rate or --expert-slots, lower --max-context, or raise --memory." in line
    status, line = start(f"compute.memory_bytes={1 << 50}")
    assert status == 1
    assert "--memory asks for 1073741824 MiB, but beside the dense weights" in line


def test_no_pack_and_half_a_pack_are_told_apart(start: Start, tiny_pack: Path, tmp_path: Path) -> None:
    assert start(f"compute.pack={tmp_path}/nowhere") == (1, f"compute_node: There is no folder {tmp_path}/nowhere.")
    half = shutil.copytree(tiny_pack, tmp_path / "half")
    (half / "manifest.json").unlink()
    status, line = start(f"compute.pack={half}")
    assert (status, f"{half} is not a finished pack: it has no manifest.json. Run" in line) == (3, True)


def test_a_damaged_dense_file_is_refused_by_name(start: Start, tiny_pack: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_pack, tmp_path / "damaged")
    weights = next((damaged / DENSE_FOLDER).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-9] ^= 0x10
    weights.write_bytes(content)
    status, line = start(f"compute.pack={damaged}")
    assert (status, f"{weights} is not the file that was packed" in line) == (3, True)
    os.truncate(weights, 100)
    status, line = start(f"compute.pack={damaged}")
    assert (status, f"{weights} is not the file that was packed" in line) == (3, True)


def test_the_pack_of_another_model_than_the_stores_is_refused_with_both_sides(
    start: Start, tiny_pack: Path, store: RunningStore, tmp_path: Path
) -> None:
    other = pack_tiny_model(tmp_path, "qwen3_moe")
    status, line = start(f"compute.pack={other}")
    assert status == 1
    for side in (PackManifest.read(other).spec.fingerprint, PackManifest.read(tiny_pack).spec.fingerprint):
        assert side in line
    assert store.endpoint in line
    assert list(store.stats().leases) == []


def test_a_store_that_is_not_there_is_waited_for_and_then_named(start: Start, socket_dir: Path) -> None:
    status, line = start(f"compute.store_endpoint=unix:{socket_dir}/no.sock", "compute.attach_deadline_s=0.5")
    assert status == 1
    assert f"The expert store at unix:{socket_dir}/no.sock had not published every expert after 0.5 s." in line
    assert "Last: " in line, "and what was in the way"


def test_a_peer_that_is_no_store_is_not_taken_for_one(start: Start) -> None:
    """Another gRPC service is refused at once; a port that says nothing is given until the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        status, line = start(f"compute.store_endpoint={endpoint}", "compute.attach_deadline_s=0.5")
        assert (status, f"The expert store at {endpoint} had not published" in line) == (1, True)
    stranger = grpc.server(ThreadPoolExecutor(1))
    endpoint = f"127.0.0.1:{stranger.add_insecure_port('127.0.0.1:0')}"
    stranger.start()
    status, line = start(f"compute.store_endpoint={endpoint}")
    assert (status, "The peer does not serve this call; it is another service" in line) == (1, True)
    stranger.stop(0).wait()


def test_a_port_that_is_taken_is_named(start: Start, store: RunningStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, line = start(f"compute.listen={address}")
        assert (status, f"Cannot listen on {address}; another process may hold it" in line) == (1, True)
        status, line = start(f"compute.metrics_listen={address}")
        assert (status, f"The metrics page cannot listen on {address}" in line) == (1, True)
    # Metrics come last: by then the node had the arena.
    wait_until(lambda: "attached." in store.log.read_text() and not store.stats().leases)


def test_a_signal_while_starting_ends_the_node_at_once(tiny_pack: Path, socket_dir: Path) -> None:
    """The longest part of a start is to wait for the store."""
    endpoint = f"unix:{socket_dir}/no.sock"
    with (
        RunningNode(tiny_pack, endpoint, socket_dir, name="terminated") as terminated,
        RunningNode(tiny_pack, endpoint, socket_dir, name="interrupted") as interrupted,
    ):
        for node, number in ((terminated, signal.SIGTERM), (interrupted, signal.SIGINT)):
            wait_until(lambda log=node.log: "The expert store cannot be attached" in log.read_text(), 120, node.log)  # type: ignore[misc]
            node.process.send_signal(number)
            assert node.process.wait(20) == 0
            assert "Traceback" not in node.log.read_text()


def test_a_taken_http_port_is_found_before_the_model_is_loaded(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        status, sentence = start(f"compute.http_listen={address}")
    assert status == 1
    assert sentence.startswith(f"compute_node: The HTTP API cannot listen on {address} (Address already in use)")


def test_others_cannot_use_the_http_api_by_mistake(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOE_API_KEYS", raising=False)
    status, sentence = start("compute.http_listen=0.0.0.0:0")
    assert status == 2
    assert "compute.http_listen is '0.0.0.0:0', which others can reach: give keys with" in sentence
