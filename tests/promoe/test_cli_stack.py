"""A stack of scripted services in real processes: start, watch, crash, stop, and what is shown meanwhile."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from promoe.cli import stack as stack_module
from promoe.cli.pack_cache import PackPlan, ToolCommand
from promoe.cli.run_dir import RunDir
from promoe.cli.stack import Stack
from promoe.cli.stack_plan import StackPlan
from promoe.cli.stack_view import PhaseLine, PhaseState, StackStatus
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import ServiceCommand
from promoe.errors import EXIT_PACK_DAMAGED, PackDamaged, Unavailable
from promoe.pack_manifest import MANIFEST_FILE
from tests.promoe.specs import manifest_of, small_spec

DEADLINE_S = 30.0
ROOT = Path(__file__).resolve().parents[2]
SERVICES = "tests.promoe.scripted_services"


class RecordingView:
    """Remembers everything that was shown."""

    def __init__(self) -> None:
        self.shown: list[StackStatus] = []
        self.notes: list[str] = []
        self.num_pauses = 0

    def show(self, status: StackStatus) -> None:
        self.shown.append(status)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def pause(self) -> None:
        self.num_pauses += 1

    def close(self) -> None:
        pass

    def phase(self, name: str) -> PhaseLine:
        """The phase as it was shown last."""
        return next(line for line in self.shown[-1].phases if line.name == name)


class Bench:
    """A stack with everything around it."""

    def __init__(self, folder: Path, stop: StopSignals) -> None:
        self.folder = folder
        self.stop = stop
        self.view = RecordingView()
        self.run_dir = RunDir(folder)
        self.pack = PackPlan("tiny", folder / "pack", ())
        self.node_module = SERVICES
        self.node_manners: tuple[str, ...] = ()
        self.stop_deadline_s = 20.0
        self.predictor_module: str | None = None

    def make(self) -> Stack:
        endpoint = f"unix:{self.folder}/node.sock"
        node = ServiceCommand(
            "compute node",
            self.node_module,
            ("node", endpoint, *self.node_manners),
            self.run_dir.log("node"),
            self.stop_deadline_s,
        )
        store = ServiceCommand(
            "expert store", SERVICES, ("store", self.run_dir.store_endpoint), self.run_dir.log("store"), 20.0
        )
        predictor = None
        if self.predictor_module is not None:
            log = self.run_dir.log("predictor")
            arguments = ("predictor", self.run_dir.predictor_endpoint)
            predictor = ServiceCommand("predictor", self.predictor_module, arguments, log, 20.0)
        return Stack(StackPlan(self.pack, endpoint, store, node, predictor), self.run_dir, self.view, self.stop)

    def pid_of(self, name: str) -> int:
        """The service's newest process, from its log."""
        return int(self.run_dir.log(name).read_text().rpartition(f"{name} ")[2].split()[0])

    def phase_in_state(self) -> str:
        state = self.run_dir.read_state()
        assert state is not None
        return state.phase


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, StopSignals() as stop:
        bench = Bench(Path(folder), stop)
        with bench.run_dir.hold():
            yield bench
        for child in psutil.Process().children(recursive=True):
            assert "scripted_services" not in " ".join(child.cmdline()), "a service was left behind"


def watch_until(stack: Stack, condition: Callable[[], bool]) -> None:
    end_s = time.perf_counter() + DEADLINE_S
    while not condition():
        assert time.perf_counter() < end_s, "it did not happen in time"
        stack.watch()
        time.sleep(0.02)


def test_comes_up_through_its_phases_and_stops_the_node_before_the_store(bench: Bench) -> None:
    stack = bench.make()
    assert stack.bring_up()
    assert [line.state for line in bench.view.shown[-1].phases] == [PhaseState.DONE] * 4
    fractions = [line.fraction for status in bench.view.shown for line in status.phases if line.name == "fill"]
    assert 0.5 in fractions
    assert "4 of 8 experts per layer" in bench.view.phase("ready").detail
    assert "emulated link of 1.00 GB/s" in bench.view.phase("ready").detail
    assert bench.phase_in_state() == "ready"
    watch_until(stack, lambda: "hit rate prefill 25.0 %, decode 75.0 %" in bench.view.shown[-1].footer)
    stack.take_down()
    assert (bench.folder / "stopped.txt").read_text().split() == ["node", "store"]
    assert bench.view.phase("stop") == PhaseLine("stop", PhaseState.DONE, "stopped")
    stops = [line.detail for status in bench.view.shown for line in status.phases if line.name == "stop"]
    assert stops == ["stopping the compute node", "stopping the expert store", "stopped"]
    assert "on unix:" in bench.view.phase("ready").detail, "what was is left standing"
    assert bench.phase_in_state() == "stop"
    assert bench.view.notes == []


@pytest.mark.parametrize(("name", "title"), [("store", "expert store"), ("node", "compute node")])
def test_a_service_that_crashes_is_restarted_and_told(bench: Bench, name: str, title: str) -> None:
    stack = bench.make()
    try:
        assert stack.bring_up()
        first = bench.pid_of(name)
        os.kill(first, signal.SIGKILL)
        watch_until(stack, lambda: bool(bench.view.notes))
        assert bench.view.notes[0].startswith(f"The {title} was killed by SIGKILL")
        assert bench.view.phase("ready").state is PhaseState.RUNNING
        assert bench.phase_in_state() == "restart"
        watch_until(stack, lambda: bench.view.phase("ready").state is PhaseState.DONE)
        assert bench.pid_of(name) != first
        assert bench.phase_in_state() == "ready"
    finally:
        stack.take_down()


def test_the_predictor_starts_beside_the_others_and_stops_after_the_node(bench: Bench) -> None:
    bench.predictor_module = SERVICES
    bench.node_manners = ("predicted",)
    stack = bench.make()
    assert stack.bring_up()
    assert bench.view.phase("ready").detail.endswith("predictor frequency@1")
    assert psutil.pid_exists(bench.pid_of("predictor"))
    stack.take_down()
    assert (bench.folder / "stopped.txt").read_text().split() == ["node", "predictor", "store"]
    assert bench.view.notes == []


def test_a_predictor_that_crashes_is_restarted_and_told_once_while_the_stack_stays_ready(bench: Bench) -> None:
    bench.predictor_module = SERVICES
    bench.node_manners = ("predicted",)
    stack = bench.make()
    try:
        assert stack.bring_up()
        pids = {bench.pid_of("predictor")}
        for num_lives in (2, 3):
            os.kill(bench.pid_of("predictor"), signal.SIGKILL)
            watch_until(stack, lambda: bench.pid_of("predictor") not in pids)
            pids.add(bench.pid_of("predictor"))
            assert len(pids) == num_lives
        (note,) = bench.view.notes
        assert note.startswith("The predictor was killed by SIGKILL")
        assert "meanwhile no experts are predicted" in note
        assert bench.view.phase("ready").state is PhaseState.DONE
        assert bench.phase_in_state() == "ready"
    finally:
        stack.take_down()


def test_a_predictor_that_never_starts_delays_nothing_and_is_told_with_its_last_words(bench: Bench) -> None:
    bench.predictor_module = "this"
    stack = bench.make()
    try:
        assert stack.bring_up()
        assert "no predictor" in bench.view.phase("ready").detail
        watch_until(stack, lambda: bool(bench.view.notes))
        assert "Namespaces are one honking great idea" in bench.view.notes[0]
    finally:
        stack.take_down()
    assert (bench.folder / "stopped.txt").read_text().split() == ["node", "store"]


def test_a_predictor_that_the_node_never_reaches_is_not_waited_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "PREDICTOR_GRACE_S", 0.2)
    bench.predictor_module = SERVICES
    stack = bench.make()
    try:
        assert stack.bring_up()
        assert bench.view.phase("ready").state is PhaseState.DONE
        assert bench.view.notes == []
    finally:
        stack.take_down()


def test_a_state_that_cannot_be_written_stops_nothing(bench: Bench) -> None:
    (bench.folder / "stack.json.tmp").mkdir()
    stack = bench.make()
    try:
        assert stack.bring_up()
        assert bench.view.phase("ready").state is PhaseState.DONE
        assert set(bench.view.notes) == {f"The state in {bench.folder} cannot be written (Is a directory)."}
    finally:
        stack.take_down()
    assert (bench.folder / "stopped.txt").read_text().split() == ["node", "store"]


def test_a_node_that_ends_while_loading_fails_the_start_with_its_last_words(bench: Bench) -> None:
    bench.node_module = "this"
    stack = bench.make()
    try:
        with pytest.raises(Unavailable, match=r"(?s)compute node ended with exit code 0.*Namespaces are"):
            stack.bring_up()
        assert bench.view.phase("load").state is PhaseState.FAILED
    finally:
        stack.take_down()
    assert (bench.folder / "stopped.txt").read_text().split() == ["store"]


@pytest.mark.parametrize("mend_command", ["promoe pack tiny /packs/tiny", None])
def test_a_pack_that_a_service_found_damaged_is_told_with_what_mends_it(bench: Bench, mend_command: str | None) -> None:
    (bench.folder / "modules").mkdir()
    (bench.folder / "modules" / "picky.py").write_text(f"raise SystemExit({EXIT_PACK_DAMAGED})")
    os.environ["PYTHONPATH"] += f":{bench.folder / 'modules'}"
    bench.pack = PackPlan("tiny", bench.folder / "pack", (), mend_command)
    bench.node_module = "picky"
    stack = bench.make()
    try:
        with pytest.raises(PackDamaged if mend_command else Unavailable, match="ended with exit code 3") as caught:
            stack.bring_up()
    finally:
        stack.take_down()
    assert str(caught.value).endswith(mend_command or "")
    assert ("only what is damaged" in str(caught.value)) is (mend_command is not None)


def test_a_signal_while_starting_ends_the_start(bench: Bench) -> None:
    stack = bench.make()
    os.kill(os.getpid(), signal.SIGTERM)
    assert not stack.bring_up()
    stack.take_down()


def test_a_second_signal_kills_what_does_not_stop(bench: Bench) -> None:
    bench.node_manners = ("stubborn",)
    stack = bench.make()
    assert stack.bring_up()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    begin_s = time.perf_counter()
    stack.take_down()
    assert time.perf_counter() - begin_s < 10
    assert not psutil.pid_exists(bench.pid_of("node"))
    assert bench.view.notes == []


def test_a_node_that_does_not_stop_in_time_is_killed_and_told(bench: Bench) -> None:
    bench.node_manners = ("stubborn",)
    bench.stop_deadline_s = 0.2
    stack = bench.make()
    assert stack.bring_up()
    stack.take_down()
    assert not psutil.pid_exists(bench.pid_of("node"))
    assert bench.view.notes == ["The compute node did not stop by itself and is killed."]
    assert (bench.folder / "stopped.txt").read_text().split() == ["store"]


def make_packer(bench: Bench, code: str) -> None:
    (bench.folder / "modules").mkdir()
    (bench.folder / "modules" / "tiny_packer.py").write_text(f"import sys, time, pathlib\n{code}\n")
    os.environ["PYTHONPATH"] += f":{bench.folder / 'modules'}"
    pack_dir = bench.folder / "packs" / "tiny"
    bench.pack = PackPlan("tiny", pack_dir, (ToolCommand("pack tiny", "tiny_packer", (str(pack_dir),)),))


def test_packs_on_first_use_and_only_then(bench: Bench) -> None:
    manifest_of(small_spec()).write(bench.folder)
    make_packer(
        bench,
        f"p = pathlib.Path(sys.argv[1]); p.mkdir(); "
        f"(p / '{MANIFEST_FILE}').write_bytes((p.parents[1] / '{MANIFEST_FILE}').read_bytes())",
    )
    for _ in range(2):  # the second time the pack is there: mkdir would fail
        stack = bench.make()
        try:
            assert stack.bring_up()
        finally:
            stack.take_down()
    assert bench.view.num_pauses == 2


def test_a_packer_that_fails_is_a_sentence_and_nothing_is_started(bench: Bench) -> None:
    make_packer(bench, "sys.exit(4)")
    stack = bench.make()
    with pytest.raises(Unavailable, match="“pack tiny” failed with exit code 4"):
        stack.bring_up()
    assert bench.view.phase("pack").state is PhaseState.FAILED
    assert not bench.run_dir.log("store").exists()
    stack.take_down()


def test_a_signal_stops_the_packer(bench: Bench) -> None:
    make_packer(bench, "pathlib.Path(sys.argv[1]).with_name('begun').touch(); time.sleep(60)")
    stack = bench.make()
    os.kill(os.getpid(), signal.SIGINT)
    begin_s = time.perf_counter()
    assert not stack.bring_up()
    assert time.perf_counter() - begin_s < 20
    stack.take_down()
    assert bench.view.phase("ready").state is PhaseState.WAITING
