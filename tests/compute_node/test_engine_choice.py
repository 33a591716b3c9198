"""The engine is chosen by what it can do with one token."""

import pytest
import torch
from transformers import PreTrainedModel

from compute_node.config import EngineChoice
from compute_node.continuous_engine import ContinuousEngine
from compute_node.engine import Engine, EngineKind
from compute_node.engine_choice import EnginePlan, EngineStarter
from compute_node.step_ledger import StepLedger
from promoe.errors import InsufficientMemory, ModelUnsupported, Unavailable
from tests.compute_node.tiny_serving import LIMITS, StepLog, engine_request, greedy_oracle, submit
from tests.families import make_tiny_model

PLAN = EnginePlan(LIMITS, max_request_tokens=512)


def start(model: PreTrainedModel, choice: EngineChoice, steps: StepLog | None = None) -> tuple[Engine, str]:
    steps = steps or StepLog()
    return EngineStarter(model, StepLedger(), PLAN, steps.observe, steps.died).start(choice)


@pytest.mark.parametrize(
    ("family", "kind", "word"),
    [
        ("qwen2_moe", EngineKind.CONTINUOUS, "tried"),
        ("gpt_oss", EngineKind.CONTINUOUS, "tried"),
        ("deepseek_v2", EngineKind.INTERLEAVED, "deepseek_v2 models: RuntimeError"),
        ("qwen3_next", EngineKind.INTERLEAVED, "linear_attention"),
    ],
)
def test_auto_takes_the_engine_that_can_serve_the_family(family: str, kind: EngineKind, word: str) -> None:
    model = make_tiny_model(family)
    expected = greedy_oracle(model, [5, 6, 7], 6)
    steps = StepLog()
    engine, reason = start(model, EngineChoice.AUTO, steps)
    try:
        assert engine.kind is kind
        assert word in reason
        assert reason.endswith(".")
        assert submit(engine, engine_request("r", [5, 6, 7], 6)).token_ids() == expected
    finally:
        engine.stop()
    assert not steps.has_died


def test_an_engine_that_ends_before_it_is_asked_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model("qwen3_next")
    started = ContinuousEngine.start

    def start_and_wait_for_the_end(engine: ContinuousEngine) -> None:
        started(engine)
        thread = engine._loop._generation_thread
        assert thread is not None
        thread.join(30)

    monkeypatch.setattr(ContinuousEngine, "start", start_and_wait_for_the_end)
    engine, reason = start(model, EngineChoice.AUTO)
    engine.stop()
    assert engine.kind is EngineKind.INTERLEAVED
    assert "linear_attention" in reason


def test_what_was_asked_for_is_taken() -> None:
    model = make_tiny_model("qwen2_moe")
    for choice, kind in (
        (EngineChoice.CONTINUOUS, EngineKind.CONTINUOUS),
        (EngineChoice.INTERLEAVED, EngineKind.INTERLEAVED),
    ):
        steps = StepLog()
        engine, reason = start(model, choice, steps)
        engine.stop()
        assert engine.kind is kind
        assert "asked" in reason
        assert steps.phases, "a token was computed before anybody asked"


def test_continuous_batching_that_was_asked_for_but_cannot_be_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match=r"cannot serve deepseek_v2 models: .*Use engine auto or interleaved\."):
        start(make_tiny_model("deepseek_v2"), EngineChoice.CONTINUOUS)


def test_a_wrong_first_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model("qwen2_moe")
    plain = EngineStarter._plain_forward
    # As if paged attention computed something else than the plain forward pass.
    monkeypatch.setattr(EngineStarter, "_plain_forward", lambda starter: -plain(starter))
    engine, reason = start(model, EngineChoice.AUTO)
    engine.stop()
    assert engine.kind is EngineKind.INTERLEAVED
    assert "where a plain forward pass says" in reason


@pytest.mark.parametrize("error", [Unavailable("The expert store is gone."), torch.OutOfMemoryError("out of memory")])
def test_a_failure_that_is_not_the_engines_is_not_hidden_by_another_engine(error: Exception) -> None:
    model = make_tiny_model("qwen2_moe")
    passes = iter([None, error])

    def fail_in_the_probe(*_: object) -> None:
        raised = next(passes)
        if raised is not None:
            raise raised

    model.register_forward_pre_hook(fail_in_the_probe)
    expected = Unavailable if isinstance(error, Unavailable) else InsufficientMemory
    with pytest.raises(expected):
        start(model, EngineChoice.AUTO)
