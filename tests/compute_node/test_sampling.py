"""Sampling against `generate`'s own processors, and against itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin

from compute_node.sampling import RowSampler, Sampling
from promoe.errors import InternalError
from tests.families import make_tiny_model

VOCAB = 24
MODEL = make_tiny_model("qwen2_moe")

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 0.01]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 2**64 - 1),
)


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


def processed_by_generate(sampling: Sampling, history: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    config = GenerationConfig(do_sample=not sampling.is_greedy, repetition_penalty=sampling.repetition_penalty)
    if not sampling.is_greedy:
        config.temperature, config.top_k, config.top_p = sampling.temperature, sampling.top_k, sampling.top_p
    processors = GenerationMixin._get_logits_processor(MODEL, config, input_ids_seq_length=len(history))  # type: ignore[arg-type]
    scores_1V: torch.Tensor = processors(torch.tensor([history]), logits_V[None])  # type: ignore[arg-type]
    return scores_1V[0]


@given(sampling=samplings, logits_seed=st.integers(0, 1000), history=st.lists(st.integers(0, VOCAB - 1), min_size=1))
def test_draws_invert_the_distribution_that_generate_makes(
    sampling: Sampling, logits_seed: int, history: list[int]
) -> None:
    sampler = RowSampler(sampling, history)
    uniforms = torch.Generator().manual_seed(sampling.seed)
    for step in range(4):
        logits_V = logits_of(logits_seed + step)
        scores_V = processed_by_generate(sampling, history, logits_V.clone())
        if sampling.is_greedy:
            expected = int(scores_V.argmax())
        else:
            target = float(torch.rand(1, generator=uniforms, dtype=torch.float64))
            shares = torch.softmax(scores_V.double(), dim=0).tolist()
            expected = next(index for index in range(VOCAB) if sum(shares[: index + 1]) > target * sum(shares))
        assert sampler.draw(logits_V).token_id == expected
        history = [*history, expected]


def test_frequencies_are_the_probabilities() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -math.inf])
    sampler = RowSampler(Sampling(temperature=0.8, seed=7), [0])
    num_draws = 4000
    counts = torch.zeros(5)
    for _ in range(num_draws):
        counts[sampler.draw(logits_V).token_id] += 1
    expected = torch.softmax(logits_V / 0.8, dim=0)
    assert counts[4] == 0
    # Five standard deviations of a binomial share.
    assert torch.all((counts / num_draws - expected).abs() <= 5 * (expected * (1 - expected) / num_draws).sqrt())


def test_a_seed_repeats_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        sampler = RowSampler(Sampling(temperature=1.0, seed=seed), [0])
        return [sampler.draw(logits_of(step)).token_id for step in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_the_logits_are_left_as_they_are() -> None:
    logits_V = logits_of(0)
    before = logits_V.clone()
    RowSampler(Sampling(temperature=0.5, top_k=3, repetition_penalty=2.0, top_logprobs=2), [1, 2]).draw(logits_V)
    assert torch.equal(logits_V, before)


def test_logprobs_are_the_models_own_before_any_filter() -> None:
    logits_V = logits_of(5)
    token = RowSampler(Sampling(temperature=2.0, top_k=2, repetition_penalty=3.0, seed=1, top_logprobs=4), [9]).draw(
        logits_V
    )
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    assert token.logprob == float(logprobs_V[token.token_id])
    best = torch.topk(logprobs_V, 4)
    assert [other.token_id for other in token.alternatives] == best.indices.tolist()
    assert [other.logprob for other in token.alternatives] == best.values.tolist()


@pytest.mark.parametrize("num_alternatives", [0, VOCAB + 0])
def test_no_more_alternatives_than_there_are_tokens(num_alternatives: int) -> None:
    sampling = Sampling(top_logprobs=min(num_alternatives, 20))
    token = RowSampler(sampling, [0]).draw(torch.zeros(3))
    assert len(token.alternatives) == min(num_alternatives, 3)
    assert token.logprob == pytest.approx(math.log(1 / 3))


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(InternalError, match="not numbers"):
        RowSampler(Sampling(temperature=1.0), [0]).draw(torch.full((4,), math.nan))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_smallest_values_that_are_allowed_keep_the_numbers_finite(top_p: float) -> None:
    sampling = Sampling(temperature=1e-5, repetition_penalty=0.01, top_p=top_p)
    logits_V = 1000 * logits_of(2)
    best = int(processed_by_generate(sampling, [0, 1], logits_V.clone()).argmax())
    assert RowSampler(sampling, [0, 1]).draw(logits_V).token_id == best


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", 5.1),
        ("temperature", 9e-6),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 0.009),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 6.0),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is .*; allowed: "):
        Sampling(**{field: value})  # type: ignore[arg-type]
