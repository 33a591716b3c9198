"""What only the interleaved engine does: turns, one request per step, whole prompts."""

import threading
from collections import Counter

import pytest
from transformers import PreTrainedModel

from compute_node.step_ledger import Phase, TokenSpan
from tests.compute_node.tiny_serving import SpanRecorder, engine_request, greedy_oracle, interleaved_engine, submit
from tests.families import make_tiny_model

PROMPTS = ([5, 6, 7], list(range(3, 60)), [8])


class HeldLedger(SpanRecorder):
    """Holds the first step until the test lets go."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def end_step(self) -> None:
        assert self.go_on.wait(timeout=60), "the test forgot to let go"
        super().end_step()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny_model("deepseek_v2")


def test_requests_take_turns(model: PreTrainedModel) -> None:
    expected = [greedy_oracle(model, prompt, 5) for prompt in PROMPTS]
    ledger = HeldLedger()
    with interleaved_engine(model, ledger) as engine:
        logs = [submit(engine, engine_request(f"r{i}", prompt, 5)) for i, prompt in enumerate(PROMPTS)]
        ledger.go_on.set()
        assert [log.token_ids() for log in logs] == expected
    # All are there when the first step ends: from the second round on nobody is two steps ahead of another.
    progress: Counter[str] = Counter()
    for (span,) in ledger.steps:
        progress[span.request_id] += 1
        if len(progress) == len(PROMPTS):
            assert max(progress.values()) - min(progress.values()) <= 1
    assert set(progress.values()) == {5}


def test_a_prompt_is_computed_in_one_piece_and_answers_token_by_token(model: PreTrainedModel) -> None:
    ledger = SpanRecorder()
    with interleaved_engine(model, ledger) as engine:
        submit(engine, engine_request("r", PROMPTS[1], 4)).tokens_and_end()
        assert engine.max_request_tokens == 512
    assert ledger.steps == [(TokenSpan("r", 57, Phase.PREFILL),), *[(TokenSpan("r", 1, Phase.DECODE),)] * 3]
