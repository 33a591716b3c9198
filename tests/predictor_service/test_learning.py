"""A whole service learns from a node's stream: gathers, trains, tries, promotes by itself, and can be told not to."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from predictor_service.trace_playback import observations
from promoe.errors import InvalidInput, ModelMismatch, PromoeError
from promoe.hint import RequestsEnded
from promoe.hint_wire import decode_version, encode_requests_ended
from promoe.predictor_admin import PredictorAdmin
from promoe.predictor_versions import LearnerReport, LearnerState, VersionAction, VersionChange
from promoe.v1 import predictor_pb2 as pb
from tests.predictor_service.learner_feed import made_up_steps
from tests.predictor_service.made_up_traces import LearnableModel, learnable_spec
from tests.promoe.specs import manifest_of
from tests.running_predictor import PredictStream, RunningPredictor
from tests.running_store import wait_until

# Of fewer documents it would learn nothing worth a promotion at first. In the idle class, on a busy machine,
# training would take minutes.
EAGER = (
    "learner.enabled=true",
    "learner.niceness=0",
    "learner.min_documents=120",
    "learner.documents_between_trainings=24",
    "learner.max_steps=400",
    "learner.serving_cpu_share=1.0",
    "learner.max_document_steps=9",
    "learner.watch_documents=30",
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = LearnableModel().write_pack(tmp_path_factory.mktemp("learning") / "pack")
    manifest_of(learnable_spec()).write(folder)
    return folder


@pytest.fixture
def service(pack: Path, socket_dir: Path) -> Iterator[RunningPredictor]:
    registry = f"predictor.registry={socket_dir / 'registry'}"
    with RunningPredictor(pack, socket_dir, registry, "predictor.predictor=transition", *EAGER) as running:
        running.wait_until_serving()
        yield running
        assert running.process.poll() is None, running.log.read_text()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


class Node:
    """Serves made-up requests; shows of each step what was asked for last."""

    def __init__(self, stream: PredictStream, admin: PredictorAdmin) -> None:
        self._stream = stream
        self._admin = admin
        self._seed = 0
        self._step = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def serve(self, documents: int = 8) -> LearnerReport:
        """As many requests, one after the other; asks how far learning is now and then, so that nothing overflows."""
        self._seed += 1
        last = ""
        for recorded in made_up_steps(documents, self._seed):
            self._step += 1
            (span,) = recorded.start.spans
            request_id = f"{self._seed}-{span.request_id}"
            if last not in ("", request_id):
                ended = encode_requests_ended(RequestsEnded((last,)))
                self._stream.send(pb.PredictRequest(requests_ended=ended))
                self._admin.learner()
            last = request_id
            wishes = decode_version(self._stream.welcome.active)
            self._stream.begin_step(self._step, replace(span, request_id=request_id), version=wishes.version)
            for shown in observations(recorded, wishes):
                self._stream.observe(replace(shown, step=self._step))
        return self._admin.learner()

    def _read(self) -> None:
        try:
            while True:
                response = self._stream.receive()
                if response.HasField("welcome"):
                    self._stream.welcome = response.welcome
        except (PromoeError, StopIteration, ValueError):
            return


def promotions(admin: PredictorAdmin) -> list[VersionChange]:
    return [c for c in admin.history() if c.action is VersionAction.ACTIVATE and c.who == "the learner"]


@pytest.mark.slow
def test_it_promotes_what_it_learned_and_says_why(service: RunningPredictor) -> None:
    admin = PredictorAdmin(service.endpoint)
    assert admin.learner().state is LearnerState.GATHERING
    with service.node() as stream:
        node = Node(stream, admin)
        wait_until(lambda: node.serve().documents > 0 and bool(promotions(admin)), 200, service.log)
        (promoted,) = promotions(admin)[:1]
        assert promoted.before == "transition@1"
        assert promoted.after.startswith("learned-here@1.")
        numbers = {number.name: number.value for number in promoted.numbers}
        assert numbers["gain"] > 0.0, numbers
        wait_until(lambda: admin.learner().state is not LearnerState.SHADOWING, 60, service.log)
        # A person's word goes before the learner's.
        admin.activate("frequency", "ann", "I know better")
        wait_until(lambda: node.serve().state in (LearnerState.GATHERING, LearnerState.TRAINING), 60, service.log)
        assert not any(info.version == "transition@1" and info.state.value == "shadow" for info in admin.versions())
    assert service.terminate() == 0
    service.process.poll = lambda: None  # type: ignore[method-assign]  # it was meant to end


def test_it_can_be_paused_asked_and_killed(service: RunningPredictor) -> None:
    admin = PredictorAdmin(service.endpoint)
    with service.node() as stream:
        node = Node(stream, admin)
        admin.pause_learner(True, "ann")
        assert node.serve().paused
        with pytest.raises(InvalidInput, match="paused"):
            admin.train("ann", "at once")
        admin.pause_learner(False, "ann")
        wait_until(lambda: node.serve(2).documents > 0, 60, service.log)
        (child,) = [
            each
            for each in psutil.Process(service.process.pid).children()
            if "predictor_service.learner" in each.cmdline()
        ]
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: admin.learner().state is LearnerState.FAILED, 30, service.log)
        assert "process ended" in admin.learner().news
        assert node.serve(1).documents >= 0, "hints go on"
    with pytest.raises(InvalidInput, match="Nobody is named"):
        admin.pause_learner(True, " ")


def test_a_service_that_does_not_learn_says_so(pack: Path, socket_dir: Path) -> None:
    with RunningPredictor(pack, socket_dir) as running:
        running.wait_until_serving()
        admin = PredictorAdmin(running.endpoint)
        assert admin.learner().state is LearnerState.OFF
        with pytest.raises(ModelMismatch, match="does not learn"):
            admin.train("ann", "")
        with pytest.raises(ModelMismatch, match="does not learn"):
            admin.pause_learner(True, "ann")


def test_without_a_registry_it_refuses_to_learn(pack: Path, socket_dir: Path) -> None:
    with RunningPredictor(pack, socket_dir, "learner.enabled=true") as running:
        assert running.process.wait(60) == 2
        assert "predictor.registry is missing" in running.log.read_text()
