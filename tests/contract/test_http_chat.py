"""Chats over HTTP with OpenAI's own client, against a tiny model that computes: what comes is what the engine draws."""

import asyncio
import json
import math
from collections.abc import Sequence

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from promoe import Client
from tests.http_node import MODEL, TIMEOUT_S, HttpNode

CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "then the sand"}]
GO_ON = {"ignore_eos": True}
"""Tiny models end where they like."""


def answer(node: HttpNode, **options: object) -> ChatCompletion:
    with node.client() as client:
        asked = {"model": MODEL, "messages": CHAT, "max_tokens": 8, "seed": 5, "extra_body": GO_ON} | options
        return client.chat.completions.create(**asked)  # type: ignore[call-overload, no-any-return]


def chunks(node: HttpNode, **options: object) -> list[ChatCompletionChunk]:
    with node.client() as client:
        asked = {"model": MODEL, "messages": CHAT, "max_tokens": 8, "seed": 5, "extra_body": GO_ON} | options
        return list(client.chat.completions.create(stream=True, **asked))  # type: ignore[call-overload]


def text_of(pieces: Sequence[ChatCompletionChunk], index: int = 0) -> str:
    return "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices if choice.index == index)


def test_http_and_grpc_give_the_same_answer(live: HttpNode) -> None:
    over_http = answer(live, temperature=0.8, top_p=0.9, presence_penalty=0.5, logit_bias={"70": 2.0})
    with Client(live.serving.endpoint) as client:
        over_grpc = client.complete(
            [{"role": "user", "content": "then the sand"}],
            max_tokens=8,
            seed=5,
            ignore_eos=True,
            temperature=0.8,
            top_p=0.9,
            presence_penalty=0.5,
            logit_bias={70: 2.0},
        )
    assert over_http.choices[0].message.content == over_grpc.text
    assert over_http.choices[0].finish_reason == "length"
    usage = over_http.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (over_grpc.prompt_tokens, 8)
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert over_http.system_fingerprint == "fp_ffffffffffffffff"
    assert over_http.id.startswith("chatcmpl-")


def test_a_stream_is_the_whole_answer_in_pieces(live: HttpNode) -> None:
    whole = answer(live, n=2)
    pieces = chunks(live, n=2, stream_options={"include_usage": True})
    assert [text_of(pieces, index) for index in range(2)] == [choice.message.content for choice in whole.choices]
    assert {piece.id for piece in pieces} == {pieces[0].id}
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert pieces[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason]
    assert reasons == ["length", "length"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    assert all(piece.usage is None for piece in pieces[:-1])


def test_answers_of_one_request_are_those_of_seeds_that_count_up(live: HttpNode) -> None:
    together = answer(live, n=3)
    alone = [answer(live, seed=5 + index).choices[0].message.content for index in range(3)]
    assert [choice.message.content for choice in together.choices] == alone
    assert len(set(alone)) == 3


def test_log_probabilities_are_the_models_own(live: HttpNode) -> None:
    plain = answer(live, temperature=0.0)
    shown = answer(live, temperature=0.0, logprobs=True, top_logprobs=3)
    assert shown.choices[0].message.content == plain.choices[0].message.content
    assert plain.choices[0].logprobs is None
    assert shown.choices[0].logprobs is not None
    tokens = shown.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == 8
    for token in tokens:
        assert token.logprob <= 0
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        # Greedy: the likeliest is the one that came.
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    pieces = chunks(live, temperature=0.0, logprobs=True, top_logprobs=3)
    streamed = [
        token
        for piece in pieces
        for choice in piece.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert streamed == tokens


def test_a_stop_string_ends_the_answer_and_is_not_shown(live: HttpNode) -> None:
    text = answer(live, max_tokens=30).choices[0].message.content or ""
    stop = text[6:8]
    for stops in (stop, [stop, "never to be seen"]):
        stopped = answer(live, max_tokens=30, stop=stops).choices[0]
        assert stopped.message.content == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"


def test_a_token_that_is_banned_never_comes_and_one_that_is_favoured_does(live: HttpNode) -> None:
    with live.client() as client:
        favoured = client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=3, logit_bias={"70": 100}, temperature=0
        )
    with Client(live.serving.endpoint) as client:
        assert favoured.choices[0].message.content == client.detokenize([70] * 3)


def test_the_context_is_filled_when_no_limit_is_given(live: HttpNode) -> None:
    long = [{"role": "user", "content": "x" * 460}]
    choice = answer(live, messages=long, max_tokens=openai.NOT_GIVEN).choices[0]
    assert choice.finish_reason == "length"
    assert answer(live, max_tokens=openai.NOT_GIVEN, max_completion_tokens=2).usage.completion_tokens == 2  # type: ignore[union-attr]


def test_an_end_of_its_own_is_a_stop(live: HttpNode) -> None:
    ended = answer(live, logit_bias={"2": 100}, extra_body={}).choices[0]
    assert (ended.finish_reason, ended.message.content) == ("stop", "")


def test_parts_of_text_are_one_text(live: HttpNode) -> None:
    parts = [{"type": "text", "text": "then "}, {"type": "text", "text": "the sand"}]
    assert answer(live, messages=[{"role": "user", "content": parts}]).choices == answer(live).choices
    developer = answer(live, messages=[{"role": "developer", "content": "be kind"}, *CHAT])
    system = answer(live, messages=[{"role": "system", "content": "be kind"}, *CHAT])
    assert developer.choices == system.choices


def test_json_comes_where_json_is_asked_for(live: HttpNode) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    # A tiny model would rather write white space: it is told not to.
    bias = {str(token_id): -100 for token_id in (200, 201, 223, *range(190, 224))}
    choice = answer(live, response_format=asked, max_tokens=200, logit_bias=bias, extra_body={}).choices[0]
    if choice.finish_reason == "stop":
        assert json.loads(choice.message.content or "") in ({"a": 1}, {"a": 2})
    free = answer(live, response_format={"type": "json_object"}, extra_body={}).choices[0]
    assert (free.message.content or "").startswith("{")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_at_the_same_time_are_each_as_if_alone(live: HttpNode, temperature: float) -> None:
    """In float32, whoever is in the batch."""
    prompts = [f"{number} and the {'sand ' * number}" for number in range(12)]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": prompts[number]}],
            max_tokens=12,
            temperature=temperature,
            seed=number,
            stream=True,
            extra_body=GO_ON,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=TIMEOUT_S) as client:
            alone = [await ask(client, number) for number in range(len(prompts))]
            return alone, await asyncio.gather(*(ask(client, number) for number in range(len(prompts))))

    alone, together = asyncio.run(all_at_once())
    assert together == alone
    assert len(set(alone)) > len(prompts) / 2


def test_probabilities_add_up(live: HttpNode) -> None:
    shown = answer(live, logprobs=True, top_logprobs=20, max_tokens=1).choices[0].logprobs
    assert shown is not None
    assert shown.content is not None
    assert sum(math.exp(other.logprob) for other in shown.content[0].top_logprobs) < 1.0
