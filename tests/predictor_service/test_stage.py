"""A shadow in a process of its own looks on, is scored, and takes nobody along when it fails."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from predictor_service.catalogue import Catalogue
from predictor_service.feed import Feed
from predictor_service.lineup import Lineup
from predictor_service.session import Session
from predictor_service.shadow.process import ShadowSource
from predictor_service.shadow.tally import StepComparison
from predictor_service.stage import Stage
from predictor_service.version_log import VersionLog, Wish
from predictor_service.versions import Versions
from promoe.errors import InternalError, ResourceExhausted, Unavailable
from promoe.hint import LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from promoe.hint_wire import encode_hint, encode_observation, encode_step_start
from promoe.model_spec import Dtype
from promoe.pack_manifest import PackManifest
from promoe.predictor_versions import QualityReport, VersionAction, VersionChange, VersionState
from promoe.v1 import predictor_pb2 as pb
from tests.packs import write_synthetic_pack
from tests.predictor_service.test_versions import NamedPredictor
from tests.running_store import wait_until

NUM_LAYERS = 5
ANN = Wish("ann", "to see")


class Service:
    """A predictor service without its sockets: one session, whose events are told to the feed."""

    def __init__(self, folder: Path) -> None:
        write_synthetic_pack(folder / "pack", layers=NUM_LAYERS)
        self.spec = PackManifest.read(folder / "pack").spec
        catalogue = Catalogue(self.spec, folder / "pack", None)
        self.versions = Versions(self.spec, catalogue.load("transition"), catalogue.load, VersionLog(None, "s"))
        self.feed = Feed()
        self.session = Session("node", self.spec, self._lineup, max_rows=4)
        costs = self.session.counters.costs
        self.stage = Stage(self.versions, self.feed, ShadowSource(folder / "pack", None), lambda: costs)
        self.step = 0

    def _lineup(self) -> Lineup:
        return self.versions.lineup

    def run_steps(self, num_steps: int = 1) -> None:
        """One request's tokens, routed the same way every time."""
        for _ in range(num_steps):
            self.step += 1
            start = StepStart(self.step, (StepSpan("r1", 1, is_prefill=False),))
            self.session.begin_step(start)
            self._tell(pb.PredictRequest(step_start=encode_step_start(start)), pb.PredictResponse())
            for layer in range(NUM_LAYERS):
                routing = LayerRouting(layer, np.array([[layer % 4, 3 - layer % 4]], np.uint16), ready=(layer % 4,))
                observation = Observation(self.step, layer, (0,), 1, None, (routing,))
                hints = [encode_hint(hint) for hint in self.session.observe(observation)]
                request = pb.PredictRequest(observation=encode_observation(observation, Dtype.FLOAT32))
                self._tell(request, pb.PredictResponse(hints=pb.Hints(hints=hints)))

    def _tell(self, request: pb.PredictRequest, response: pb.PredictResponse) -> None:
        self.feed.tell(1, request.SerializeToString(), response.SerializeToString())

    def scored(self, version: str, num_steps: int = 1) -> QualityReport:
        """The report once so many steps of a version were scored."""

        def steps() -> int:
            return sum(quality.steps for quality in self.stage.report().qualities if quality.version == version)

        before = steps()
        self.run_steps(num_steps + 1)
        wait_until(lambda: steps() >= before + num_steps, 30)
        return self.stage.report()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path)
    yield running
    running.stage.close()
    assert not running.feed.has_listeners
    assert running.stage.report() == running.stage.report(), "nothing is scored any more"


def test_a_shadow_is_scored_beside_what_makes_the_hints(service: Service) -> None:
    compared: list[StepComparison] = []
    service.stage.listeners.append(lambda report: compared.extend(report.comparisons))
    change = service.stage.set_shadow("frequency", ANN)
    assert change is not None
    assert service.versions.lineup.is_scored
    report = service.scored("frequency@1", 3)
    qualities = {quality.version: quality for quality in report.qualities}
    assert [quality.state for quality in report.qualities] == [VersionState.ACTIVE, VersionState.SHADOW]
    for quality in qualities.values():
        assert quality.steps < quality.layers <= (quality.steps + 1) * NUM_LAYERS, "and those of a step that goes on"
        assert 0 < quality.found <= quality.routed
        assert quality.ready <= quality.hinted
        assert quality.observations > 0
        assert quality.predict_s > 0
    wait_until(lambda: len(compared) >= 3, 10)
    assert {(one.active_version, one.shadow_version) for one in compared} == {("transition@1", "frequency@1")}
    assert {one.request_ids for one in compared} == {("r1",)}
    assert report.comparisons >= 3
    assert service.stage.clear_shadow(ANN) is not None
    assert not service.versions.lineup.is_scored, "nobody wants to know any more"


def test_scores_are_made_while_somebody_watches(service: Service) -> None:
    with service.stage.watching() as report, service.stage.watching():
        assert [quality.version for quality in report().qualities] == ["transition@1"]
        assert service.scored("transition@1").qualities[0].found > 0
    assert not service.feed.has_listeners
    kept = service.stage.report()
    assert kept.qualities[0].steps > 0, "what was scored is remembered"
    assert kept.comparisons == 0


def test_a_shadow_takes_the_place_of_another_and_gives_it_to_nobody(service: Service) -> None:
    service.stage.set_shadow("frequency", ANN)
    service.stage.set_shadow("none", ANN)
    service.scored("none@1")
    assert {quality.version for quality in service.stage.report().qualities} >= {"none@1", "transition@1"}
    service.stage.activate("none@1", ANN)
    assert service.versions.shadow is None
    assert not service.feed.has_listeners
    service.stage.rollback(ANN)
    assert service.versions.active.version.version == "transition@1"


def test_a_shadow_that_dies_is_said_to_be_none_any_more(service: Service) -> None:
    service.stage.set_shadow("frequency", ANN)
    process = service.stage._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: service.versions.shadow is None and not service.feed.has_listeners, 30)
    (failed,) = [quality for quality in service.stage.report().qualities if quality.fault]
    assert (failed.version, "status -9" in failed.fault) == ("frequency@1", True)
    last = service.versions.log.changes()[-1]
    assert (last.action, last.version, last.who) == (VersionAction.CLEAR_SHADOW, "frequency@1", "the service")
    service.run_steps()
    assert service.stage.set_shadow("frequency", ANN) is not None, "it may be tried again"
    assert not any(quality.fault for quality in service.stage.report().qualities)


def test_a_shadow_that_cannot_be_had_by_its_process_changes_nothing(service: Service) -> None:
    # Made from a file that the process knows nothing of.
    service.versions._load = lambda version: NamedPredictor(version, ObservedKind.NONE)
    with pytest.raises(InternalError, match=r"The shadow lost@1 cannot look on: There is no version lost@1"):
        service.stage.set_shadow("lost@1", ANN)
    assert service.versions.shadow is None
    assert not service.feed.has_listeners
    assert service.versions.log.changes() == []


class FullLog(VersionLog):
    """On a disk without room."""

    def add(self, action: VersionAction, before: str, after: str, wish: Wish, version: str = "") -> VersionChange:
        raise ResourceExhausted("No space left on device.")


def test_a_shadow_that_cannot_be_written_down_leaves_nothing_running(service: Service) -> None:
    service.versions.log = FullLog(None, "s")
    with pytest.raises(ResourceExhausted):
        service.stage.set_shadow("frequency", ANN)
    assert service.versions.shadow is None
    assert service.stage._process is None
    assert not service.feed.has_listeners
    assert not service.versions.lineup.is_scored


def test_a_change_stands_whatever_becomes_of_who_scores_it(service: Service, tmp_path: Path) -> None:
    service.stage.set_shadow("frequency", ANN)
    with service.stage.watching():
        service.stage._source = ShadowSource(tmp_path / "no pack", None)
        assert service.stage.activate("frequency", ANN) is not None
        assert service.versions.active.version.version == "frequency@1"
        assert not service.feed.has_listeners
        assert not service.versions.lineup.is_scored


def test_a_stage_that_is_closed_starts_nothing_any_more(service: Service) -> None:
    service.stage.set_shadow("frequency", ANN)
    with service.stage.watching():
        service.stage.close()
    assert not service.feed.has_listeners
    service.stage.activate("none", ANN)
    assert not service.feed.has_listeners
    with pytest.raises(Unavailable):
        service.stage.set_shadow("frequency", ANN)


def test_a_stage_that_is_closed_scores_nothing(service: Service) -> None:
    service.stage.close()
    with pytest.raises(Unavailable), service.stage.watching():
        pass
