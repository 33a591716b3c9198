"""A predictor that dies, stops, comes back or talks nonsense while answers are on their way: the same tokens.

Every process is real but the one that talks nonsense. The oracle is the same answer before there was a predictor.
"""

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from promoe import Client
from promoe.node_report import HintStats, PredictorState
from promoe.pack_manifest import PackManifest
from promoe.v1 import predictor_pb2 as pb
from tests.running_predictor import RunningPredictor
from tests.running_store import wait_until
from tests.scripted_predictor import VERSION, Response, ScriptedPredictor, good_hint, hints, welcome
from tests.system.tiny_stack import BackgroundAnswer, TinyStack, pack_tiny_model, quiet_answer, running_stack

NUM_TOKENS = 40


@dataclass(frozen=True)
class Asked:
    """A node that looks for a predictor in vain, its answer, and how long its log was when the test began."""

    stack: TinyStack
    client: Client
    folder: Path
    quiet: list[int]
    log_length: int = 0

    @property
    def endpoint(self) -> str:
        return f"unix:{self.folder / 'predictor.sock'}"

    @property
    def hints(self) -> HintStats:
        return self.client.cache_stats().hints

    def open_predictor(self) -> RunningPredictor:
        return RunningPredictor(self.stack.pack_dir, self.folder, "predictor.predictor=gate_ahead")

    def wait_for(self, state: PredictorState) -> None:
        wait_until(lambda: self.client.info().predictor.state is state, 60)

    def log_lines(self, text: str) -> list[str]:
        return [line for line in self.stack.node.log.read_text()[self.log_length :].splitlines() if text in line]

    def answer(self) -> BackgroundAnswer:
        return BackgroundAnswer(self.client, num_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, module_socket_dir: Path) -> Iterator[Asked]:
    pack_dir = pack_tiny_model(tmp_path_factory.mktemp("predicted"))
    settings = (f"compute.predictor_endpoint=unix:{module_socket_dir / 'predictor.sock'}", "compute.expert_slots=4")
    with running_stack(pack_dir, module_socket_dir, *settings) as stack, stack.client() as client:
        yield Asked(stack, client, module_socket_dir, quiet_answer(client, num_tokens=NUM_TOKENS))


@pytest.fixture
def asked(started: Asked) -> Iterator[Asked]:
    started.wait_for(PredictorState.AWAY)
    yield replace(started, log_length=len(started.stack.node.log.read_text()))
    assert started.stack.node.process.poll() is None, "the node outlives every predictor"


def test_hints_change_no_token(asked: Asked) -> None:
    with asked.open_predictor():
        asked.wait_for(PredictorState.CONNECTED)
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        active = asked.client.info().predictor.active
        assert active is not None
        assert active.predictor == "gate_ahead"
        stats = asked.hints
        assert stats.taken > NUM_TOKENS // 2
        assert (stats.invalid, stats.wrong_version, stats.overflow) == (0, 0, 0)
        assert stats.observations_sent > NUM_TOKENS
        assert sum(stats.latency.counts) >= stats.taken
        qualities = [quality for quality in stats.qualities if quality.version == active.version]
        assert 0 < sum(quality.correct for quality in qualities) <= sum(quality.hinted for quality in qualities)
    asked.wait_for(PredictorState.AWAY)
    assert len(asked.log_lines("is away")) == len(asked.log_lines("Connected to the predictor")) == 1


def test_a_killed_predictor_is_missed_by_nobody_and_found_again(asked: Asked) -> None:
    with asked.open_predictor() as predictor:
        asked.wait_for(PredictorState.CONNECTED)
        answer = asked.answer().in_the_middle()
        predictor.kill()
        assert answer.tokens() == asked.quiet
        asked.wait_for(PredictorState.AWAY)
        num_taken = asked.hints.taken
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        assert asked.hints.taken == num_taken
    answer = asked.answer().in_the_middle()
    with asked.open_predictor():
        assert answer.tokens() == asked.quiet
        asked.wait_for(PredictorState.CONNECTED)
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        assert asked.hints.taken > num_taken


def test_a_stopped_predictor_costs_its_hints_only(asked: Asked) -> None:
    with asked.open_predictor() as predictor:
        asked.wait_for(PredictorState.CONNECTED)
        answer = asked.answer().in_the_middle()
        predictor.process.send_signal(signal.SIGSTOP)
        try:
            assert answer.tokens() == asked.quiet
            num_taken = asked.hints.taken
            assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
            # Hints that were under way when it stopped may still have come.
            assert asked.hints.taken <= num_taken + 1
        finally:
            predictor.process.send_signal(signal.SIGCONT)
        asked.wait_for(PredictorState.CONNECTED)
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        assert asked.hints.taken > num_taken


def all_kinds_of_nonsense(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    """Among it hints that are well formed and as wrong as can be: the same few experts, always."""
    model = next(requests).hello.model
    yield welcome()
    for request in requests:
        if not request.HasField("observation"):
            continue
        observation = request.observation
        wrong = good_hint(observation)
        wrong.layer %= model.num_moe_layers
        wrong.step += wrong.layer <= observation.layer
        out_of_range, twice, no_number, stranger = (pb.Hint.FromString(wrong.SerializeToString()) for _ in range(4))
        out_of_range.layer = model.num_moe_layers + 7
        twice.experts[1] = twice.experts[0]
        no_number.scores[0] = float("nan")
        stranger.version = "nobody@0"
        yield hints(wrong, out_of_range, twice, no_number, stranger)


def flood(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield welcome()
    message = hints(*[good_hint(pb.Observation(step=2, layer=0), VERSION.version)] * 64).SerializeToString()
    yield from itertools.repeat(message)


def test_nonsense_changes_no_token(asked: Asked) -> None:
    spec = PackManifest.read(asked.stack.pack_dir).spec
    num_taken, num_strangers = asked.hints.taken, asked.hints.wrong_version
    with ScriptedPredictor(asked.endpoint, spec, all_kinds_of_nonsense):
        asked.wait_for(PredictorState.CONNECTED)
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        wait_until(lambda: asked.hints.wrong_version >= num_strangers + NUM_TOKENS)
        stats = asked.hints
        assert stats.invalid >= 3 * NUM_TOKENS
        assert stats.taken > num_taken, "what is well formed is believed"
    for fate in ("invalid", "wrong_version"):
        assert len(asked.log_lines(f"A hint is dropped ({fate})")) == 1


def test_a_flood_changes_no_token(asked: Asked) -> None:
    spec = PackManifest.read(asked.stack.pack_dir).spec
    with ScriptedPredictor(asked.endpoint, spec, flood) as service:
        wait_until(lambda: service.num_sessions > 0)
        assert quiet_answer(asked.client, num_tokens=NUM_TOKENS) == asked.quiet
        wait_until(lambda: service.num_sessions > 1)
    assert len(asked.log_lines("It sent more than")) == 1
