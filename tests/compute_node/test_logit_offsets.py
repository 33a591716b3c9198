"""Bias and penalties: by the formula, whatever was drawn in which order, on greedy and sampled answers."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute_node.logit_offsets import LogitOffsets
from compute_node.sampling import RowSampler, Sampling

VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)
PENALTIES = st.floats(-2, 2)


def logits_of(seed: int) -> torch.Tensor:
    return 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


@given(
    bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
    presence=PENALTIES,
    frequency=PENALTIES,
    drawn=st.lists(TOKENS, max_size=12),
)
def test_the_offset_is_bias_minus_presence_minus_frequency_times_count(
    bias: dict[int, float], presence: float, frequency: float, drawn: list[int]
) -> None:
    offsets = LogitOffsets(bias, presence, frequency)
    for token_id in drawn:
        offsets.add_to(torch.zeros(VOCAB))
        offsets.count(token_id)
    counts = Counter(drawn)
    expected = [bias.get(t, 0.0) - presence * (counts[t] > 0) - frequency * counts[t] for t in range(VOCAB)]
    assert offsets.add_to(torch.zeros(VOCAB)).tolist() == torch.tensor(expected, dtype=torch.float32).tolist()


def test_without_any_the_scores_are_the_same_object() -> None:
    scores_V = logits_of(1)
    offsets = LogitOffsets({}, 0.0, 0.0)
    assert offsets.is_nothing
    assert offsets.add_to(scores_V) is scores_V


@given(seed=st.integers(0, 200), presence=PENALTIES, frequency=PENALTIES, temperature=st.sampled_from([0.0, 0.9]))
def test_draws_are_those_of_logits_that_were_changed_by_hand(
    seed: int, presence: float, frequency: float, temperature: float
) -> None:
    bias = {3: 1.5, 7: -100.0}
    asked = Sampling(
        temperature=temperature,
        seed=seed,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        repetition_penalty=1.2,
    )
    plain = Sampling(temperature=temperature, seed=seed, repetition_penalty=1.0)
    sampler, oracle = RowSampler(asked, [5]), RowSampler(plain, [5])
    seen, counts = {5}, Counter[int]()
    for step in range(6):
        logits_V = logits_of(seed + step)
        changed = logits_V.clone()
        for token_id in seen:  # the repetition penalty is on the model's own logits
            changed[token_id] = changed[token_id] / 1.2 if changed[token_id] > 0 else changed[token_id] * 1.2
        offsets = [bias.get(t, 0.0) - presence * (counts[t] > 0) - frequency * counts[t] for t in range(VOCAB)]
        expected = oracle.draw(changed + torch.tensor(offsets, dtype=torch.float32)).token_id
        assert sampler.draw(logits_V).token_id == expected
        seen.add(expected)
        counts[expected] += 1


def test_the_prompt_is_not_counted() -> None:
    logits_V = torch.zeros(VOCAB)
    logits_V[4] = 0.5
    assert RowSampler(Sampling(presence_penalty=2.0), [4]).draw(logits_V).token_id == 4


def test_bias_decides_greedily() -> None:
    logits_V = logits_of(3)
    assert RowSampler(Sampling(logit_bias={9: 100.0}), [0]).draw(logits_V).token_id == 9
    best = int(logits_V.argmax())
    assert RowSampler(Sampling(logit_bias={best: -100.0}), [0]).draw(logits_V).token_id != best


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; allowed: -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; allowed: -2 to 2"),
        ({"logit_bias": {1: 101.0}}, "logit_bias of token 1 is 101.0; allowed: -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 is nan; allowed: -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias has 1025 entries; allowed: at most 1024"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**options)  # type: ignore[arg-type]


def test_what_changes_logits_is_no_plain_argmax() -> None:
    assert Sampling().is_plain_argmax
    for options in ({"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"logit_bias": {1: 1.0}}):
        assert not Sampling(**options).is_plain_argmax
