"""Versions are changed while answers are on their way: no stream is interrupted, and the tokens are the quiet ones.

Every process is real. The oracle is the same answer before there was a predictor.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from promoe.node_report import HintStats, PredictorState
from promoe.predictor_admin import PredictorAdmin
from tests.running_predictor import RunningPredictor
from tests.running_store import wait_until
from tests.system.tiny_stack import BackgroundAnswer, TinyStack, pack_tiny_model, quiet_answer, running_stack

NUM_TOKENS = 60
NUM_STREAMS = 8


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, module_socket_dir: Path) -> Iterator[TinyStack]:
    pack_dir = pack_tiny_model(tmp_path_factory.mktemp("versioned"))
    settings = (f"compute.predictor_endpoint=unix:{module_socket_dir / 'predictor.sock'}", "compute.expert_slots=4")
    with running_stack(pack_dir, module_socket_dir, *settings) as running:
        yield running


def wait_for_hints(hints: Callable[[], HintStats], answers: Sequence[BackgroundAnswer]) -> None:
    """Until some more were taken, or nobody is served any more."""
    before = hints().taken
    wait_until(lambda: hints().taken > before or all(answer.is_done for answer in answers), 60)


def test_changes_under_load_interrupt_nobody(stack: TinyStack, module_socket_dir: Path) -> None:
    with stack.client() as client:
        quiet = quiet_answer(client, num_tokens=NUM_TOKENS)

        def hints() -> HintStats:
            return client.cache_stats().hints

        registry = f"predictor.registry={module_socket_dir / 'registry'}"
        with RunningPredictor(stack.pack_dir, module_socket_dir, registry) as predictor:
            wait_until(lambda: client.info().predictor.state is PredictorState.CONNECTED, 60)
            admin = PredictorAdmin(predictor.endpoint)
            answers = [BackgroundAnswer(client, num_tokens=NUM_TOKENS) for _ in range(NUM_STREAMS)]
            # gate_ahead reads hidden states, frequency and transition read none: what is sampled changes, too.
            for version in ("frequency", "transition", "frequency", "transition"):
                admin.activate(version, "the test", "under load")
                wait_for_hints(hints, answers)
                admin.rollback("the test", "under load")
            assert [answer.tokens() for answer in answers] == [quiet] * NUM_STREAMS
            assert quiet_answer(client, num_tokens=NUM_TOKENS) == quiet
            # A shadow, and a canary that reads what the active version does not: in one step with it, and without.
            admin.activate("frequency", "the test", "reads no hidden states")
            admin.set_shadow("transition", "the test", "under load")
            answers = [BackgroundAnswer(client, num_tokens=NUM_TOKENS) for _ in range(NUM_STREAMS)]
            wait_for_hints(hints, answers)
            admin.activate("gate_ahead", "the test", "under load", canary_share=0.4)
            wait_for_hints(hints, answers)
            admin.rollback("the test", "under load")
            wait_for_hints(hints, answers)
            admin.clear_shadow("the test", "under load")
            assert [answer.tokens() for answer in answers] == [quiet] * NUM_STREAMS
            stats = hints()
            assert stats.invalid == 0
            assert predictor.stats().sessions == 1
            assert predictor.stats().refused_observations == 0, "every observation was what its version asked for"
            assert len({quality.version for quality in stats.qualities}) >= 2, "several versions' hints were scored"
            # The session that the node opened first goes on.
            assert stack.node.log.read_text().count("Connected to the predictor") == 1
            assert len(admin.history()) == 14
        assert quiet_answer(client, num_tokens=NUM_TOKENS) == quiet
