"""What is asked for survives the wire; the answer is the sum of its messages."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.generation import (
    Answer,
    FinishReason,
    GenerateOptions,
    encode_chat,
    encode_detokenize,
    encode_generate,
    is_chat,
)
from promoe.v1 import inference_pb2
from tests.promoe.scripted_inference import accepted, delta, finish

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOKEN_IDS = st.lists(st.integers(0, (1 << 32) - 1), max_size=8)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, (1 << 32) - 1),
        "temperature": st.floats(),
        "top_k": st.integers(0, (1 << 32) - 1),
        "top_p": st.floats(),
        "seed": st.integers(0, (1 << 64) - 1),
        "repetition_penalty": st.floats(),
        "stop_strings": st.lists(TEXT, min_size=1, max_size=3),
        "stop_token_ids": TOKEN_IDS.filter(bool),
        "top_logprobs": st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "presence_penalty": st.floats(),
        "frequency_penalty": st.floats(),
        "logit_bias": st.dictionaries(st.integers(0, (1 << 32) - 1), st.floats(-100, 100), min_size=1, max_size=4),
    },
)


@given(OPTIONS)
def test_options_arrive_as_they_were_given_and_no_others(options: GenerateOptions) -> None:
    sent = encode_generate("x", options).SerializeToString()
    sampling = inference_pb2.GenerateRequest.FromString(sent).sampling
    present = {field.name for field, _ in sampling.ListFields()}
    assert present == set(options)
    for name, value in options.items():
        arrived = getattr(sampling, name)
        # NaN is no number to compare, and refusing it is the server's part.
        plain = type(value)(arrived) if isinstance(value, list | dict) else arrived
        assert plain == value or value != value


@given(st.lists(st.tuples(TEXT, TOKEN_IDS), max_size=10))
def test_an_answer_is_the_sum_of_its_messages(pieces: Sequence[tuple[str, list[int]]]) -> None:
    answer = Answer()
    assert answer.fold(accepted("r9", 4, 11)) is None
    for text, token_ids in pieces:
        folded = answer.fold(delta(text, *token_ids))
        assert folded is not None
        assert (folded.text, list(folded.token_ids)) == (text, token_ids)
        assert answer.finish_reason is None
    assert answer.fold(finish(len(pieces))) is None
    assert answer.text == "".join(text for text, _ in pieces)
    assert answer.token_ids == [number for _, token_ids in pieces for number in token_ids]
    assert (answer.request_id, answer.prompt_tokens, answer.seed) == ("r9", 4, 11)
    assert answer.finish_reason is FinishReason.STOP_STRING
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(pieces)


def test_an_empty_message_adds_nothing() -> None:
    answer = Answer()
    assert answer.fold(inference_pb2.GenerateResponse()) is None
    assert (answer.text, answer.finish_reason, answer.usage) == ("", None, None)


def test_every_reason_to_finish_is_known() -> None:
    for value in inference_pb2.FinishReason.DESCRIPTOR.values:
        answer = Answer()
        answer.fold(
            inference_pb2.GenerateResponse(
                finish=inference_pb2.Finish(reason=inference_pb2.FinishReason.Value(value.name))
            )
        )
        assert answer.finish_reason is not None
        assert answer.finish_reason.value == value.name.removeprefix("FINISH_REASON_").lower()


def test_token_ids_may_be_numpys() -> None:
    ids = cast("list[int]", list(np.arange(3, dtype=np.int64)))
    assert list(encode_generate(ids, {}).token_ids.ids) == [0, 1, 2]
    assert list(encode_detokenize(ids).token_ids) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"holds 1\.5; token ids are integers"):
        encode_detokenize([1.5])  # type: ignore[list-item]  # the wrong type is the test
    with pytest.raises(ValueError, match="holds 4294967296"):
        encode_detokenize([1 << 32])


def test_prompts_are_told_apart() -> None:
    assert not is_chat("text")
    assert not is_chat([1, 2])
    assert is_chat([{"role": "user", "content": "x"}])
    for wrong in ([{"role": "user", "content": 3}], [{"role": "user", "text": "x"}], [{"role": "user"}, 7]):
        with pytest.raises(ValueError, match="A chat message is a mapping of role and content to text"):
            encode_chat(wrong)  # type: ignore[arg-type]  # the wrong types are the test


def test_an_option_of_none_is_left_to_the_server() -> None:
    request = encode_generate("x", {"seed": None, "stop_strings": None})  # type: ignore[typeddict-item]
    assert request.sampling == inference_pb2.SamplingParams()
