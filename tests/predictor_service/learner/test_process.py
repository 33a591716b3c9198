"""The learner's process over its real sockets: gathers, trains, survives garbage, and is survived when it is killed."""

import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from predictor_service.artifact import read_artifact
from predictor_service.learner import __main__ as learner
from predictor_service.learner.child import LearnerChild
from predictor_service.learner.control import (
    Answer,
    AskStatus,
    CandidateTrained,
    KnowVersions,
    LearnerStatus,
    Pause,
    Train,
    TrainingFailed,
)
from predictor_service.predictor import PredictorSource
from predictor_service.predictors.learned import LearnedPredictor
from promoe.errors import Unavailable
from tests.predictor_service.full_disk import full_disk
from tests.predictor_service.learner_feed import ROUTER_INPUT, made_up_steps, session_packets
from tests.predictor_service.made_up_traces import LearnableModel, learnable_spec
from tests.promoe.specs import manifest_of
from tests.running_store import wait_until

DOCUMENTS = 40


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = LearnableModel().write_pack(tmp_path_factory.mktemp("learner") / "pack")
    manifest_of(learnable_spec()).write(folder)
    return folder


class Running:
    """A learner's process, and what it said."""

    def __init__(self, pack: Path, out: Path, *settings: str) -> None:
        shares = ["learner.cpu_share=1.0", "learner.serving_cpu_share=1.0"]
        # In the idle class it would wait for a moment in which nobody else on the machine has anything to do.
        bounds = [f"predictor.pack={pack}", "learner.max_steps=12", "learner.niceness=18", *shares]
        chosen = [*bounds, *settings]
        self.child = LearnerChild([word for text in chosen for word in ("--set", text)], out)

    def feed(self, packets: Iterator[bytes]) -> None:
        """All of them, a status now and then so that the socket never overflows."""
        for number, packet in enumerate(packets):
            while not self.child.feed.send(packet):
                self.status()
            if number % 50 == 0:
                self.status()

    def serve(self, documents: int = DOCUMENTS, seed: int = 1, session: int = 1) -> LearnerStatus:
        before = self.status().documents_seen
        self.feed(session_packets(session, made_up_steps(documents, seed), ROUTER_INPUT))
        status = self.status()
        while status.documents_seen < before + documents:
            status = self.status()
        return status

    def status(self) -> LearnerStatus:
        self.child.send(AskStatus())
        answer = self.next_answer()
        assert isinstance(answer, LearnerStatus)
        return answer

    def next_answer(self) -> Answer:
        while True:
            for answer in self.child.answers():
                return answer


@pytest.fixture
def eager(pack: Path, tmp_path: Path) -> Iterator[Running]:
    """Not niced down: a busy machine would leave it no time to train."""
    process = Running(pack, tmp_path / "out", "learner.niceness=0")
    yield process
    process.child.close()


@pytest.fixture
def running(pack: Path, tmp_path: Path) -> Iterator[Running]:
    process = Running(pack, tmp_path / "out", f"learner.keep_on_disk={tmp_path / 'kept'}")
    yield process
    process.child.close()


def test_it_learns_from_what_is_served_and_goes_on_from_a_parent(pack: Path, eager: Running) -> None:
    running = eager
    status = running.serve()
    assert status.documents == DOCUMENTS
    assert status.tokens == DOCUMENTS * 12
    assert status.lost_steps == status.bad_packets == 0
    running.child.send(Train(None, "learned@1"))
    first = running.next_answer()
    assert isinstance(first, CandidateTrained)
    running.child.send(Train(Path(first.path), "learned@2"))
    second = running.next_answer()
    assert isinstance(second, CandidateTrained)
    child, parent = read_artifact(Path(second.path)).manifest, read_artifact(Path(first.path)).manifest
    assert (parent.parent, child.parent) == ("", "learned@1")
    assert child.metrics == second.metrics
    assert child.metrics["held_out_loss"] < child.metrics["held_out_loss_of_parent"]
    assert child.metrics["held_out_loss_of_parent"] == pytest.approx(parent.metrics["held_out_loss"], rel=0.01)
    assert child.training["documents"] == DOCUMENTS
    one, other = (LearnedPredictor(PredictorSource(learnable_spec(), pack, Path(p.path))) for p in (first, second))
    assert other.version.version == "learned@2"
    assert other.has_signatures_of(one), "what is remembered of running requests goes along"
    assert running.status().is_training is False

    # A disk that is full, or a folder that cannot be: said, and nothing is left.
    out = Path(first.path).parent
    before = sorted(out.iterdir())
    (out / "learned@3.safetensors").mkdir()
    running.child.send(Train(Path(first.path), "learned@3"))
    failed = running.next_answer()
    assert isinstance(failed, TrainingFailed)
    assert "cannot be written" in failed.sentence
    assert sorted(path for path in out.iterdir() if path.is_file()) == before


def test_a_disk_that_is_really_full_ends_the_training_with_a_sentence(eager: Running, tmp_path: Path) -> None:
    eager.serve(10)
    with full_disk(tmp_path / "out") as filling:
        eager.child.send(Train(None, "learned@1"))
        failed = eager.next_answer()
        assert isinstance(failed, TrainingFailed)
        assert "learned@1 cannot be written" in failed.sentence
        assert "No space left on device" in failed.sentence
        assert [path.name for path in (tmp_path / "out").iterdir()] == [filling.name], "and nothing of it is left"
        filling.unlink()
        eager.child.send(Train(None, "learned@1"))
        assert isinstance(eager.next_answer(), CandidateTrained)


def test_garbage_and_gaps_cost_only_what_they_hit(running: Running) -> None:
    packets = list(session_packets(1, made_up_steps(6), ROUTER_INPUT))
    running.feed(iter([b"", b"\x01", b"\xff" * 40, packets[0][:9] + b"\xff\xff", *packets[:100], *packets[120:]][1:]))
    running.child.control.send(b"no command\n" + b'{"halt": true}\n')
    status = running.status()
    while status.documents_seen < 4:
        status = running.status()
    assert status.bad_packets == 3
    assert status.lost_steps > 0
    assert running.serve(3, session=2).documents_seen >= 7


def test_nothing_to_train_on_is_said(running: Running) -> None:
    running.child.send(Train(None, "learned@1"))
    answer = running.next_answer()
    assert isinstance(answer, TrainingFailed)
    assert "No documents" in answer.sentence
    running.child.send(KnowVersions({ROUTER_INPUT.version: ROUTER_INPUT.observed}))
    running.feed(iter(list(session_packets(1, made_up_steps(5), ROUTER_INPUT))[1:]))
    assert running.serve(1, session=2).documents_seen >= 6
    running.child.send(Train(None, "no version"))
    answer = running.next_answer()
    assert isinstance(answer, TrainingFailed)
    assert "NAME@VERSION" in answer.sentence


def test_paused_it_gathers_and_trains_nothing(running: Running) -> None:
    running.serve(8)
    running.child.send(Pause(True))
    running.child.send(Train(None, "learned@1"))
    status = running.status()
    assert status.is_paused
    packets = list(session_packets(2, made_up_steps(5), ROUTER_INPUT))
    running.feed(iter(packets))
    running.child.send(Train(None, "learned@2"))
    answer = running.next_answer()
    assert isinstance(answer, TrainingFailed)
    assert "already" in answer.sentence
    status = running.status()
    assert status.documents_seen == 8
    assert status.is_training
    running.child.send(Pause(False))
    assert not running.status().is_paused


def test_killed_it_is_missed_by_nobody_and_a_new_one_goes_on(pack: Path, tmp_path: Path, running: Running) -> None:
    running.serve()
    running.child.process.send_signal(signal.SIGKILL)
    running.child.process.wait()
    with pytest.raises(Unavailable):
        running.next_answer()
    with pytest.raises(Unavailable):
        running.child.feed.send(b"x")
    kept = sorted((tmp_path / "kept").rglob("*.npz"))
    assert len(kept) == DOCUMENTS
    assert stat.S_IMODE(kept[0].stat().st_mode) == 0o600
    again = Running(pack, tmp_path / "out", f"learner.keep_on_disk={tmp_path / 'kept'}")
    try:
        status = again.status()
        assert (status.documents, status.documents_seen) == (DOCUMENTS, DOCUMENTS)
    finally:
        again.child.close()
    assert again.child.process.returncode == 0, "it ends with the one who started it"


def test_it_ends_by_itself_while_somebody_waits_for_an_answer(running: Running) -> None:
    running.status()
    waiting = threading.Event()

    def wait_for_an_answer() -> None:
        waiting.set()
        with suppress(Unavailable):
            running.next_answer()

    reader = threading.Thread(target=wait_for_an_answer)
    reader.start()
    waiting.wait()
    running.child.close()
    reader.join()
    assert running.child.process.returncode == 0, "it was not killed"


def test_memory_is_bounded_and_nothing_is_written_unasked(pack: Path, tmp_path: Path) -> None:
    bound = 20_000
    small = Running(pack, tmp_path / "out", f"learner.max_nbytes={bound}", "learner.half_life_s=1.0")
    try:
        status = small.serve(60)
        assert 0 < status.nbytes <= bound
        assert 0 < status.documents < 60
        assert asdict(status)["oldest_age_s"] >= 0
    finally:
        small.child.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_the_disk_gets_too_old_while_nothing_is_served(pack: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    aging = Running(pack, tmp_path / "out", f"learner.keep_on_disk={kept}", "learner.disk_max_age_s=1.0")
    try:
        aging.serve(1)
        wait_until(lambda: list(kept.rglob("*.npz")) == [], 30)
    finally:
        aging.child.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--feed-fd", "900", "--control-fd", "901", "--out", "x"], "predictor.pack is missing"),
        (["--feed-fd", "900", "--control-fd", "901", "--out", "x", "--set", "learner.alpha=2"], "between 0 and 1"),
        (["--feed-fd", "900", "--control-fd", "901", "--out", "x", "--set", "predictor.pack=/no"], "descriptor"),
    ],
)
def test_a_wrong_start_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [] if "missing" in sentence else ["--set", "predictor.pack=/no"]
    assert learner.main([*arguments, *settings]) == 2
    assert sentence in capsys.readouterr().err
