"""Versions are changed while a node is served: a real service process, its admin's calls, and a node's stream."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest

from predictor_service.admin.in_use import history_path
from predictor_service.admin.service import MOST_WATCHERS
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound, Overloaded, PromoeError, ResourceExhausted
from promoe.hint import StepSpan
from promoe.pack_manifest import PackManifest
from promoe.predictor_admin import PredictorAdmin
from promoe.predictor_versions import VersionAction, VersionOrigin, VersionState
from promoe.v1 import predictor_pb2 as pb
from tests.packs import write_synthetic_pack
from tests.running_predictor import PredictStream, RunningPredictor, one_token
from tests.running_store import wait_until

NUM_LAYERS = 5


@pytest.fixture(scope="module")
def pack(module_socket_dir: Path) -> Path:
    write_synthetic_pack(module_socket_dir / "pack", layers=NUM_LAYERS)
    return module_socket_dir / "pack"


def started(pack: Path, folder: Path, *settings: str, packets: bool = True) -> RunningPredictor:
    options = (f"predictor.registry={folder / 'registry'}", *settings)
    service = RunningPredictor(pack, folder, *options, packets=packets)
    service.wait_until_serving()
    return service


@pytest.fixture(params=["grpc", "packets"])
def service(pack: Path, socket_dir: Path, request: pytest.FixtureRequest) -> Iterator[RunningPredictor]:
    with started(pack, socket_dir, packets=request.param == "packets") as running:
        yield running
        assert running.process.poll() is None, running.log.read_text()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture
def admin(service: RunningPredictor) -> PredictorAdmin:
    return PredictorAdmin(service.endpoint)


def active(admin: PredictorAdmin) -> str:
    (info,) = [info for info in admin.versions() if info.state is VersionState.ACTIVE]
    return info.version


def run_step(node: PredictStream, step: int) -> tuple[set[str], str | None]:
    """The versions of a step's hints, and of a welcome that came with it, which is followed from the next step on."""
    node.begin_step(step, version=node.welcome.active.version)
    hints: set[str] = set()
    announced: pb.PredictWelcome | None = None
    for layer in range(NUM_LAYERS):
        node.observe(one_token(step, layer, [layer % 4, 3 - layer % 4]))
    for _ in range(NUM_LAYERS):
        while (response := node.receive()).HasField("welcome"):
            announced = response.welcome
        hints |= {hint.version for hint in response.hints.hints}
    if announced is not None:
        node.welcome = announced
    return hints, None if announced is None else announced.active.version


def test_a_change_takes_effect_between_two_steps_of_an_open_stream(
    service: RunningPredictor, admin: PredictorAdmin
) -> None:
    with service.node() as node:
        assert run_step(node, 1) == ({"transition@1"}, None)
        change = admin.activate("frequency", "ann", "to see")
        assert change is not None
        assert (change.before, change.after) == ("transition@1", "frequency@1")
        assert run_step(node, 2) == ({"transition@1"}, "frequency@1")
        assert run_step(node, 3) == ({"frequency@1"}, None)
        admin.rollback("ann", "seen")
        assert run_step(node, 4) == ({"frequency@1"}, "transition@1")
        assert run_step(node, 5) == ({"transition@1"}, None)
        with service.node("another") as later:
            assert later.welcome.active.version == "transition@1"
    assert service.stats().active.version == "transition@1"


def test_what_there_is_and_what_it_does_is_listed(admin: PredictorAdmin) -> None:
    admin.activate("frequency", "ann", "")
    listed = {info.version: info for info in admin.versions()}
    assert listed["frequency@1"].state is VersionState.ACTIVE
    assert listed["transition@1"].state is VersionState.PREVIOUS
    assert listed["none"].state is VersionState.AVAILABLE
    assert {info.origin for info in listed.values()} == {VersionOrigin.PLUGIN}


def test_history_says_who_and_why_and_survives_a_kill(pack: Path, socket_dir: Path) -> None:
    with started(pack, socket_dir) as service:
        PredictorAdmin(service.endpoint).activate("frequency", "ann", "it is simpler")
        service.kill()
    with started(pack, socket_dir) as again:
        admin = PredictorAdmin(again.endpoint)
        assert active(admin) == "frequency@1", "what was active goes on"
        told = [(change.action, change.before, change.after, change.who, change.why) for change in admin.history()]
        assert (VersionAction.ACTIVATE, "transition@1", "frequency@1", "ann", "it is simpler") in told
        assert [change.number for change in admin.history()] == [1, 2, 3]
        assert [change.number for change in admin.history(1)] == [3]
    with started(pack, socket_dir, "predictor.predictor=transition") as other:
        assert active(PredictorAdmin(other.endpoint)) == "transition@1", "what is configured goes before what was"


def test_a_version_that_is_gone_at_the_next_start_is_said_and_done_without(pack: Path, socket_dir: Path) -> None:
    with started(pack, socket_dir) as service:
        PredictorAdmin(service.endpoint).activate("frequency", "ann", "")
    path = history_path(socket_dir / "registry", PackManifest.read(pack).spec.fingerprint)
    path.write_text(path.read_text().replace("frequency@1", "frequency@9"))
    with started(pack, socket_dir) as again:
        assert active(PredictorAdmin(again.endpoint)) == "transition@1"
        assert "frequency@9 was active and cannot be any more" in again.log.read_text()


@pytest.mark.parametrize(
    ("version", "error"),
    [("nothing@1", ModelNotFound), ("a/../b@1", InvalidInput), ("learned", ModelNotFound)],
)
def test_what_cannot_be_activated_changes_nothing(
    admin: PredictorAdmin, version: str, error: type[PromoeError]
) -> None:
    with pytest.raises(error):
        admin.activate(version, "ann", "")
    assert active(admin) == "transition@1"
    assert [change.action for change in admin.history()] == [VersionAction.START]


def test_nobody_and_a_wrong_belief_are_refused(admin: PredictorAdmin) -> None:
    with pytest.raises(InvalidInput, match="Nobody is named"):
        admin.activate("frequency", "", "")
    with pytest.raises(ModelMismatch, match="expected none@1 to be active"):
        admin.activate("frequency", "ann", "", expected_active="none@1")
    with pytest.raises(InvalidInput, match="Nothing was active before"):
        admin.rollback("ann", "")


def test_of_two_admins_at_once_one_wins_and_the_other_is_told(admin: PredictorAdmin) -> None:
    def try_to(version: str) -> bool:
        try:
            return admin.activate(version, version, "mine", expected_active="transition@1") is not None
        except ModelMismatch:
            return False

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(try_to, ["frequency", "none"]))
    assert outcomes.count(True) == 1
    assert active(admin) == ["frequency@1", "none@1"][outcomes.index(True)]


def test_a_history_that_cannot_be_written_keeps_what_is_active(pack: Path, socket_dir: Path) -> None:
    with started(pack, socket_dir) as service:
        admin = PredictorAdmin(service.endpoint)
        path = history_path(socket_dir / "registry", PackManifest.read(pack).spec.fingerprint)
        path.unlink()
        path.mkdir()
        with pytest.raises(ResourceExhausted, match="nothing was changed"):
            admin.activate("frequency", "ann", "")
        assert active(admin) == "transition@1"


def test_a_service_that_is_killed_while_it_activates_goes_on_with_one_or_the_other(
    pack: Path, socket_dir: Path
) -> None:
    with started(pack, socket_dir) as service, ThreadPoolExecutor(1) as threads:
        asked = threads.submit(PredictorAdmin(service.endpoint).activate, "frequency", "ann", "")
        os.kill(service.process.pid, signal.SIGKILL)
        answered = asked.exception(timeout=60) is None
    with started(pack, socket_dir) as again:
        admin = PredictorAdmin(again.endpoint)
        written = any(change.action is VersionAction.ACTIVATE for change in admin.history())
        assert written or not answered, "what was answered was written down"
        assert active(admin) == ("frequency@1" if written else "transition@1")


def test_a_shadow_is_compared_without_effect(service: RunningPredictor, admin: PredictorAdmin) -> None:
    with service.node() as node, closing(admin.watch(0.1)) as reports:
        assert [quality.version for quality in next(reports).qualities] == ["transition@1"]
        change = admin.set_shadow("frequency", "ann", "to see")
        assert change is not None
        assert change.version == "frequency@1"
        assert admin.set_shadow("frequency@1", "ann", "again") is None
        for step, report in enumerate(reports, 1):
            hints, _ = run_step(node, step)
            assert hints == {"transition@1"}
            if report.comparisons > 2:
                break
        scores = {quality.version: quality for quality in report.qualities}
        assert scores["frequency@1"].state is VersionState.SHADOW
        assert scores["transition@1"].found > 0
        assert scores["frequency@1"].routed > 0
        states = {info.version: info.state for info in admin.versions()}
        assert states["frequency@1"] is VersionState.SHADOW
        assert admin.clear_shadow("ann", "seen") is not None
        assert admin.clear_shadow("ann", "seen") is None
        assert [change.action for change in admin.history(2)] == [VersionAction.SHADOW, VersionAction.CLEAR_SHADOW]


def test_a_canary_has_its_share_of_the_requests(service: RunningPredictor, admin: PredictorAdmin) -> None:
    with service.node() as node:
        assert run_step(node, 1) == ({"transition@1"}, None)
        change = admin.activate("frequency", "ann", "to try", canary_share=0.5)
        assert change is not None
        assert (change.action, change.version) == (VersionAction.CANARY, "frequency@1")
        run_step(node, 2)
        assert node.welcome.canary.version == "frequency@1"
        made = {request: versions_of_request(node, step, request) for step, request in enumerate("abcdefgh", 3)}
        assert set(made.values()) == {"transition@1", "frequency@1"}
        assert made["a"] == versions_of_request(node, 20, "a"), "a request stays with the version that drew it"
        assert active(admin) == "transition@1"
        admin.rollback("ann", "tried")
        run_step(node, 21)
        assert not node.welcome.HasField("canary")
        assert {versions_of_request(node, step, request) for step, request in enumerate("abcdefgh", 22)} == {
            "transition@1"
        }


def versions_of_request(node: PredictStream, step: int, request: str) -> str:
    """Who makes the hints of a step of one request."""
    node.begin_step(step, StepSpan(request, 1, is_prefill=False), version=node.welcome.active.version)
    made: set[str] = set()
    for layer in range(NUM_LAYERS):
        node.observe(one_token(step, layer, [layer % 4, 3 - layer % 4]))
        made |= {hint.version for hint in node.receive().hints.hints}
    (version,) = made
    return version


def test_what_cannot_be_tried_is_told(admin: PredictorAdmin) -> None:
    with pytest.raises(InvalidInput, match="makes the hints already"):
        admin.set_shadow("transition", "ann", "")
    with pytest.raises(InvalidInput, match="canary's share is 2"):
        admin.activate("frequency", "ann", "", canary_share=2.0)
    with pytest.raises(InvalidInput, match=r"interval_s is 0\.01"):
        next(admin.watch(0.01))
    with pytest.raises(ModelNotFound):
        admin.set_shadow("nothing@1", "ann", "")


def test_not_everybody_can_watch_at_once(admin: PredictorAdmin) -> None:
    with ExitStack() as stack:
        for _ in range(MOST_WATCHERS):
            next(stack.enter_context(closing(admin.watch(10))))
        with pytest.raises(Overloaded, match="watch already"):
            next(admin.watch(10))
    reports = admin.watch(10)

    def has_room() -> bool:
        try:
            return next(admin.watch(10)).scored_s >= 0
        except Overloaded:  # it takes the service a moment to notice who has left
            return False

    wait_until(has_room, 30)
    reports.close()


def test_a_shadow_s_process_ends_with_its_service(pack: Path, socket_dir: Path) -> None:
    with started(pack, socket_dir) as service:
        PredictorAdmin(service.endpoint).set_shadow("frequency", "ann", "")
        (child,) = psutil.Process(service.process.pid).children()
        service.kill()
        psutil.wait_procs([child], timeout=30)
        assert not child.is_running()
    with started(pack, socket_dir) as again:
        PredictorAdmin(again.endpoint).set_shadow("frequency", "ann", "")
        (child,) = psutil.Process(again.process.pid).children()
        assert again.terminate() == 0
        assert not child.is_running()
