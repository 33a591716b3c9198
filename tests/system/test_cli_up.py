"""`promoe up` as a person uses it: a checkpoint in, real services in real processes, text out, and all bad luck."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
import torch

from expert_store.demo_model.build import release_id
from promoe import Client
from promoe.ids import ExpertId
from promoe.pack_manifest import PackManifest
from tests.families import save_tiny_checkpoint
from tests.packs import flip_bit

DEADLINE_S = 120.0
PROMOE = (sys.executable, "-c", "from promoe.cli.app import main; main()")
FEW_RESOURCES = ("--set", "compute.num_threads=1", "--max-context", "256", "--device", "cpu", "--http", "127.0.0.1:0")


@dataclass(frozen=True)
class Home:
    """Where one test's promoe keeps everything."""

    path: Path

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    def environment(self) -> dict[str, str]:
        own = {"PROMOE_HOME": str(self.path / "cache"), "PROMOE_RUN_DIR": str(self.run_dir), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "COLUMNS": "200"}

    def run(
        self, *arguments: str, stdin: str = "", deadline_s: float = DEADLINE_S
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command to its end."""
        return subprocess.run(
            [*PROMOE, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=deadline_s,
            check=False,
        )

    def status(self) -> dict[str, dict[str, object]]:
        """`promoe status --json`."""
        document = json.loads(self.run("status", "--json").stdout)
        assert isinstance(document, dict)
        return document


class Up:
    """A running `promoe up`."""

    def __init__(self, home: Home, arguments: Sequence[str]) -> None:
        self.home = home
        fd, name = tempfile.mkstemp(suffix=".log", dir=home.path)
        self._log = Path(name)
        with open(fd, "wb") as log:  # noqa: PTH123 - a descriptor
            self.process = subprocess.Popen(
                [*PROMOE, "up", *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=home.environment()
            )

    def lines(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str, times: int = 1) -> None:
        end_s = time.perf_counter() + DEADLINE_S
        while self.lines().count(words) < times:
            assert self.process.poll() is None, self.lines()
            assert time.perf_counter() < end_s, self.lines()
            time.sleep(0.05)

    def service(self, module: str) -> psutil.Process:
        """The running service's process."""
        (process,) = [child for child in psutil.Process(self.process.pid).children() if module in child.cmdline()]
        return process

    def services(self) -> list[psutil.Process]:
        return [self.service(module) for module in ("expert_store", "compute_node", "predictor_service")]


@contextmanager
def running_up(home: Home, *arguments: str) -> Iterator[Up]:
    up = Up(home, arguments)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.process.kill()
        up.process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("checkpoint") / "tiny", torch.float32)


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[Up]:
    """One stack for the tests that leave it serving; it packs on first use and ends on SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        home = Home(Path(folder))
        with running_up(home, str(checkpoint), "--listen", "127.0.0.1:0", "--cache-rate", "0.5", *FEW_RESOURCES) as up:
            up.wait_for("ready: tiny on 127.0.0.1")
            yield up
            services = up.services()
            up.process.terminate()
            assert up.process.wait(DEADLINE_S) == 0
            wait_until_gone(services)
            assert up.lines().rstrip().endswith("stop: stopped")
        assert home.status()["stack"] is None


@pytest.fixture
def home(shared: Up) -> Iterator[Home]:
    """A run folder of its own beside the shared stack's packs."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        (Path(folder) / "cache").symlink_to(shared.home.path / "cache")
        yield Home(Path(folder))


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def pack_of(home: Home) -> Path:
    (manifest,) = (home.path / "cache" / "packs").glob("tiny-native-*/manifest.json")
    return manifest.parent


@pytest.mark.slow
def test_the_http_api_is_said_and_answers(shared: Up) -> None:
    shared.wait_for("OpenAI-compatible API: ")
    found = re.search(r"OpenAI-compatible API: (http://127\.0\.0\.1:\d+/v1)", shared.lines())
    assert found is not None
    assert shared.home.status()["stack"]["http_url"] == found.group(1)
    (model,) = httpx2.get(f"{found.group(1)}/models", timeout=DEADLINE_S).json()["data"]
    assert model["id"] == "tiny"


@pytest.mark.slow
def test_packs_on_first_use_and_serves_every_command(shared: Up, checkpoint: Path) -> None:
    home = shared.home
    lines = r"(.*\n)*"
    assert re.search(
        rf"pack: .*on first use.*\n{lines}pack: .* is packed in .*\n{lines}fill: {lines}load: ", shared.lines()
    )
    assert "4 of 8 experts per layer on the device (cache rate 0.5" in shared.lines()
    assert re.search(r"^ready: .*, predictor gate_ahead@1$", shared.lines(), re.MULTILINE)
    services = shared.services()
    assert {os.getpgid(service.pid) for service in services} == {service.pid for service in services}

    answer = home.run("generate", "Hello there", "-n", "8")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"8 tokens .*TTFT .*TPOT .*hit rate prefill [\d.]+ %, decode [\d.]+ % .*waited for", answer.stderr)
    document = json.loads(home.run("generate", "Hello there", "-n", "8", "--json").stdout)
    assert document["text"] == answer.stdout.removesuffix("\n")

    talk = home.run("chat", "-n", "4", stdin="One?\nTwo?\n")
    assert talk.returncode == 0, talk.stderr
    # At the beginning of a line: a speed may end in the same words, as in "137.4 tokens/s".
    assert len(re.findall(r"^4 tokens ", talk.stderr, re.MULTILINE)) == 2

    status = home.status()
    assert (status["stack"]["phase"], status["store"]["fill_state"]) == ("ready", "full")
    leases = status["store_stats"]["leases"]
    assert isinstance(leases, list)
    assert [lease["pid"] for lease in leases] == [services[1].pid]
    words = home.run("status").stdout
    assert "hit rate" in words
    assert re.search(r"predictor +gate_ahead@1 at unix:.*/predictor\.sock: connected, lookahead 2", words)

    second = home.run("up", str(checkpoint), "--listen", "127.0.0.1:0")
    assert second.returncode == 1
    assert f"already running in {home.run_dir} (process {shared.process.pid})" in second.stderr


@pytest.mark.slow
def test_a_killed_store_is_adopted_and_a_killed_node_is_restarted(shared: Up) -> None:
    before = json.loads(shared.home.run("generate", "Hello", "-n", "6", "--json").stdout)
    num_ready = shared.lines().count("ready: tiny on")

    shared.service("expert_store").kill()
    shared.wait_for("ready: restarting the expert store")
    during = json.loads(shared.home.run("generate", "Hello", "-n", "6", "--json").stdout)
    assert during["token_ids"] == before["token_ids"]
    shared.wait_for("ready: tiny on", times=num_ready + 1)
    assert shared.home.status()["store_stats"]["adopted"] is True

    node = shared.service("compute_node")
    node.kill()
    shared.wait_for("The compute node was killed by SIGKILL")
    shared.wait_for("ready: tiny on", times=num_ready + 2)
    after = json.loads(shared.home.run("generate", "Hello", "-n", "6", "--json").stdout)
    assert after["token_ids"] == before["token_ids"]
    assert shared.service("compute_node").pid != node.pid


@pytest.mark.slow
def test_a_killed_predictor_comes_back_and_the_node_with_it(shared: Up) -> None:
    def active() -> object:
        node = shared.home.status()["node"]
        assert isinstance(node["predictor"], dict)
        return node["predictor"]["active"]

    before = json.loads(shared.home.run("generate", "Hello", "-n", "6", "--json").stdout)
    assert active()
    killed = shared.service("predictor_service")
    killed.kill()
    shared.wait_for("The predictor was killed by SIGKILL")
    during = json.loads(shared.home.run("generate", "Hello", "-n", "6", "--json").stdout)
    assert during["token_ids"] == before["token_ids"]
    end_s = time.perf_counter() + DEADLINE_S
    while not active():
        assert time.perf_counter() < end_s, shared.lines()
    assert shared.service("predictor_service").pid != killed.pid
    assert "restarting the predictor" not in shared.lines(), "the stack stays ready"


@pytest.mark.slow
def test_without_a_predictor_none_is_started(home: Home, checkpoint: Path) -> None:
    endpoint = f"unix:{home.run_dir}/node.sock"
    with running_up(home, str(checkpoint), "--listen", endpoint, "--predictor", "none", *FEW_RESOURCES) as up:
        up.wait_for("ready: tiny on")
        assert re.search(r"^ready: .*, no predictor$", up.lines(), re.MULTILINE)
        assert len(psutil.Process(up.process.pid).children()) == 2
        up.process.terminate()
        assert up.process.wait(DEADLINE_S) == 0


@pytest.mark.slow
def test_nothing_outlives_a_killed_supervisor_and_the_next_one_drains_on_ctrl_c(home: Home, checkpoint: Path) -> None:
    endpoint = f"unix:{home.run_dir}/node.sock"
    with running_up(home, str(checkpoint), "--listen", endpoint, *FEW_RESOURCES) as killed:
        killed.wait_for("load: ")
        services = killed.services()
        killed.process.kill()
        wait_until_gone(services)
    assert home.status()["stack"] is None

    with running_up(home, str(checkpoint), "--listen", endpoint, *FEW_RESOURCES) as up:
        up.wait_for("ready: tiny on")
        assert "on first use" not in up.lines()
        with Client(endpoint) as client, client.generate("Count", max_tokens=40, ignore_eos=True) as stream:
            next(stream.deltas())
            up.process.send_signal(signal.SIGINT)
            answer = stream.finish()
        assert len(answer.token_ids) == 40
        assert up.process.wait(DEADLINE_S) == 0


@pytest.mark.slow
def test_a_budget_that_is_too_small_fails_with_the_node_s_sentence(home: Home, checkpoint: Path) -> None:
    ended = home.run("up", str(checkpoint), "--memory", "1MB", "--listen", "127.0.0.1:0", *FEW_RESOURCES)
    assert ended.returncode == 1
    assert re.search(r"error: The compute node ended with exit code 1 .*Its last words:\n(.*\n)*.*short", ended.stderr)
    assert "--memory" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_damaged_pack_fails_with_the_store_s_sentence(home: Home, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    subprocess.run(["cp", "-r", str(pack_of(home)), str(pack)], check=True)
    flip_bit(pack, ExpertId(1, 3), PackManifest.read(pack))
    ended = home.run("up", str(pack), "--listen", "127.0.0.1:0", *FEW_RESOURCES)
    assert ended.returncode == 1
    assert "L1E3" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_that_cannot_be_packed_fails_with_the_packer_s_sentence(home: Home, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = home.run("up", str(tmp_path / "empty"), "--listen", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "failed with exit code 1; what it said is above" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_damaged_pack_in_the_cache_is_mended_by_the_command_that_is_printed(home: Home, checkpoint: Path) -> None:
    (home.path / "cache").unlink()
    arguments = ("up", str(checkpoint), "--listen", "127.0.0.1:0", "--memory", "1MB", *FEW_RESOURCES)
    assert "short" in home.run(*arguments).stderr  # it packs, and then the node refuses
    flip_bit(pack_of(home), ExpertId(1, 3), PackManifest.read(pack_of(home)))
    refused = home.run(*arguments)
    assert refused.returncode == 1
    assert "L1E3" in refused.stderr
    command = re.search(r"^promoe (pack .*)$", refused.stderr, re.MULTILINE)
    assert command, refused.stderr
    assert home.run(*shlex.split(command[1])).returncode == 0
    assert "short" in home.run(*arguments).stderr


@pytest.mark.slow
@pytest.mark.timeout(4 * DEADLINE_S)
def test_the_demo_compares_three_nodes(demo_checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        home = Home(Path(folder))
        models = home.path / "cache" / "models"
        models.mkdir(parents=True)
        (models / f"demo-{release_id()}").symlink_to(demo_checkpoint)
        # Three nodes, two predictors and other tests beside them on two cores.
        ended = home.run("demo", "-n", "12", deadline_s=3 * DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    assert "Paris" in ended.stdout
    assert ended.stdout.count("GoodPred") == 3 + 1, "after each answer, and in the table"
    rows = re.findall(r"^ +(reactive LRU|ProMoE|promoe) .* ([\d.]+ %|–) +[\d.]+ *$", ended.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["reactive LRU", "ProMoE", "promoe"]
    assert [good_pred == "–" for _, good_pred in rows] == [True, False, False], "only predictors have a GoodPred"
    assert "gave the same tokens" in ended.stdout
    assert "stop: stopped" in ended.stderr
