"""What only continuous batching does: chunked prefill, shared prefixes, requests that lose their KV blocks."""

import pytest
import torch
from transformers import PreTrainedModel

from compute_node.batch_loop import KV_BLOCK_TOKENS, BatchLimits
from compute_node.engine import EngineRequest
from compute_node.sampling import RowSampler, SampledToken
from promoe.errors import InternalError
from tests.compute_node.tiny_serving import (
    SpanRecorder,
    StepLog,
    continuous_engine,
    engine_request,
    greedy_oracle,
    submit,
)
from tests.families import make_tiny_model

LONG_PROMPT = [3 + index % 50 for index in range(3 * KV_BLOCK_TOKENS + 5)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny_model("qwen2_moe")


def test_a_prompt_longer_than_a_step_is_computed_in_pieces(model: PreTrainedModel) -> None:
    expected = greedy_oracle(model, LONG_PROMPT, 6)
    for max_batch_tokens in (7, 200):
        ledger = SpanRecorder()
        limits = BatchLimits(num_kv_blocks=16, max_batch_tokens=max_batch_tokens, max_concurrent_requests=4)
        with continuous_engine(model, limits, ledger) as engine:
            assert submit(engine, engine_request("r", LONG_PROMPT, 6)).token_ids() == expected
        assert ledger.prefill_of("r") == len(LONG_PROMPT)
        assert max(span.num_tokens for span in ledger.spans_of("r")) == min(max_batch_tokens, len(LONG_PROMPT))


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_shared_beginning_is_computed_once(model: PreTrainedModel, share_prefixes: bool) -> None:
    prompts = [LONG_PROMPT, [*LONG_PROMPT[: 2 * KV_BLOCK_TOKENS], 60, 61]]
    expected = [greedy_oracle(model, prompt, 5) for prompt in prompts]
    ledger = SpanRecorder()
    limits = BatchLimits(64, 200, 4, share_prefixes)
    with continuous_engine(model, limits, ledger) as engine:
        answers = [submit(engine, engine_request(f"r{i}", prompt, 5)).token_ids() for i, prompt in enumerate(prompts)]
    assert answers == expected
    assert ledger.prefill_of("r1") == (2 if share_prefixes else len(prompts[1]))


def test_requests_that_lose_their_kv_blocks_give_the_same_answer(model: PreTrainedModel) -> None:
    # Four requests that need 3 blocks each at the end, where 6 are to be had: some are computed again.
    prompts = [[10 + index, *LONG_PROMPT[:29]] for index in range(4)]
    options: list[dict[str, float | int]] = [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.2}, {}]
    limits = BatchLimits(6, 64, 4, share_prefixes=False)
    ledger = SpanRecorder()

    def requests() -> list[EngineRequest]:
        return [engine_request(f"r{i}", prompts[i], 40, **options[i]) for i in range(4)]

    with continuous_engine(model, BatchLimits(64, 64, 4)) as engine:
        alone = [submit(engine, request).token_ids() for request in requests()]
    with continuous_engine(model, limits, ledger) as engine:
        logs = [submit(engine, request) for request in requests()]
        assert [log.token_ids() for log in logs] == alone
    assert sum(ledger.prefill_of(f"r{i}") for i in range(4)) > sum(map(len, prompts)), "nobody lost blocks"


def test_requests_that_lost_their_kv_blocks_go_on_when_those_who_took_them_leave(model: PreTrainedModel) -> None:
    prompts = [[10 + index, *LONG_PROMPT[:29]] for index in range(4)]
    limits = BatchLimits(6, 64, 4, share_prefixes=False)
    expected = [greedy_oracle(model, prompt, 60) for prompt in prompts]
    with continuous_engine(model, limits) as engine:
        logs = [submit(engine, engine_request(f"r{i}", prompts[i], 60)) for i in range(4)]
        # The newest request is the one that gives its blocks up, when everybody needs a second one.
        for _ in range(KV_BLOCK_TOKENS + 2):
            logs[0].until_token()
        for i in range(3):
            engine.cancel(f"r{i}")
        assert logs[3].token_ids() == expected[3]
        assert submit(engine, engine_request("next", prompts[1], 60)).token_ids() == expected[1]


def test_rows_are_their_requests_own_when_others_are_in_the_middle_of_their_prefill(model: PreTrainedModel) -> None:
    # A step holds 20 tokens: the long prompt's pieces share steps with the sampled requests' rows.
    limits = BatchLimits(64, 20, 8)
    short = [engine_request(f"s{i}", [7 + i, 8], 12, temperature=1.5, seed=i, top_logprobs=1) for i in range(3)]
    with continuous_engine(model, limits) as engine:
        alone = [submit(engine, request).token_ids() for request in short]
        logs = [submit(engine, request) for request in short]
        logs[0].until_token()
        long = submit(engine, engine_request("long", LONG_PROMPT, 4, temperature=1.5, seed=9))
        assert [log.token_ids() for log in logs[1:]] == alone[1:]
        assert logs[0].token_ids() == alone[0][1:]
        long_ids = long.token_ids()
        assert submit(engine, engine_request("again", LONG_PROMPT, 4, temperature=1.5, seed=9)).token_ids() == long_ids


@pytest.mark.parametrize("max_tokens", [1, 400])
def test_a_row_that_cannot_be_drawn_from_fails_alone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    draw = RowSampler.draw

    def draw_nan(sampler: RowSampler, logits_V: torch.Tensor) -> SampledToken:
        is_victim = sampler._sampling.seed == 13
        return draw(sampler, torch.full_like(logits_V, torch.nan) if is_victim else logits_V)

    monkeypatch.setattr(RowSampler, "draw", draw_nan)
    ledger = SpanRecorder()
    good = engine_request("good", [7, 8], 30, temperature=1.0, seed=1)
    with continuous_engine(model, ledger=ledger) as engine:
        alone = submit(engine, good).token_ids()
        log = submit(engine, good)
        first = log.until_token()
        bad = submit(engine, engine_request("bad", [9], max_tokens, temperature=1.0, seed=13))
        assert isinstance(bad.failure(), InternalError)
        assert [first.token_id, *log.token_ids()] == alone
        assert submit(engine, good).token_ids() == alone
    assert len(ledger.spans_of("bad")) == 1, "the batch goes on without it"


def test_plain_greedy_rows_are_left_to_transformers(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_draw(*_: object) -> None:
        raise AssertionError("a plain greedy row was looked at")

    expected = greedy_oracle(model, LONG_PROMPT, 5)
    with continuous_engine(model) as engine:
        monkeypatch.setattr(RowSampler, "draw", no_draw)
        assert submit(engine, engine_request("r", LONG_PROMPT, 5)).token_ids() == expected


def test_the_model_is_given_back_as_it_was() -> None:
    model = make_tiny_model("gpt_oss")
    attention = model.config._attn_implementation
    expected = greedy_oracle(model, [5, 6], 4)
    with continuous_engine(model) as engine:
        assert submit(engine, engine_request("r", [5, 6], 4)).token_ids() == expected
    assert model.config._attn_implementation == attention
    assert greedy_oracle(model, [5, 6], 4) == expected


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_longest_request_fills_all_kv_blocks(family: str) -> None:
    model = make_tiny_model(family)
    limits = BatchLimits(3, 32, 2)
    steps = StepLog()
    prompt = LONG_PROMPT[: 3 * KV_BLOCK_TOKENS - 10]
    expected = greedy_oracle(model, prompt, 10)
    with continuous_engine(model, limits, steps=steps) as engine:
        assert engine.max_request_tokens == 3 * KV_BLOCK_TOKENS
        for number in range(2):
            assert submit(engine, engine_request(f"r{number}", prompt, 10)).token_ids() == expected
    assert not steps.has_died
