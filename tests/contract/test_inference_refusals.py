"""The Inference service through a real server and socket: what it refuses, and how it says so."""

import math
from pathlib import Path

import grpc
import grpc.aio
import pytest

from compute_node.engine import Engine
from promoe.v1 import inference_pb2
from tests.compute_node.tiny_serving import Serving, load_tokenizer
from tests.contract.inference_node import CONTEXT, Node, generate, ids_of, refusal, text_request

UNKNOWN_FIELD = b"\xa2\x06\x01x"  # field 100, a string


def with_unknown_field(message: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest.FromString(message.SerializeToString() + UNKNOWN_FIELD)


BAD_REQUESTS = {
    "no prompt": (inference_pb2.GenerateRequest(), "prompt is not set; allowed: text, chat, token_ids"),
    "empty text": (text_request(""), "prompt is empty"),
    "empty chat": (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), "prompt is empty"),
    "empty tokens": (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "prompt is empty"),
    "unknown token": (
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 4_000_000_000])),
        "token_ids has 4000000000; allowed: 0 to",
    ),
    "many tokens": (
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1] * (CONTEXT + 1))),
        f"prompt.token_ids has {CONTEXT + 1} entries; allowed: at most {CONTEXT}",
    ),
    "long prompt": (text_request("x" * CONTEXT), f"prompt has {CONTEXT} tokens; allowed: fewer than the context's"),
    "10 MB prompt": (text_request("x" * 10_000_000), "prompt has 10000000 bytes or more; allowed: at most 4096"),
    "unknown field": (with_unknown_field(text_request()), "request has unknown field numbers [100]; allowed: text = 1"),
    "unknown sampling field": (
        inference_pb2.GenerateRequest(
            text="x", sampling=inference_pb2.SamplingParams.FromString(b"\x99\x03\x00\x00\x00\x00\x00\x00\xf0?")
        ),
        "sampling has unknown field numbers [51]; allowed: max_tokens = 1",
    ),
    "NaN temperature": (text_request(temperature=math.nan), "temperature is nan; allowed: 0 to 5"),
    "infinite temperature": (text_request(temperature=math.inf), "temperature is inf; allowed: 0 to 5"),
    "negative temperature": (text_request(temperature=-1.0), "temperature is -1.0; allowed: 0 to 5"),
    "top_p 0": (text_request(top_p=0.0), "top_p is 0.0; allowed: above 0, up to 1"),
    "top_p above 1": (text_request(top_p=1.5), "top_p is 1.5; allowed: above 0, up to 1"),
    "top_k 0": (text_request(top_k=0), "top_k is 0; allowed: 1 or more"),
    "no penalty": (text_request(repetition_penalty=0.0), "repetition_penalty is 0.0; allowed: 0.01 to 5"),
    "presence": (text_request(presence_penalty=2.5), "presence_penalty is 2.5; allowed: -2 to 2"),
    "frequency": (text_request(frequency_penalty=math.inf), "frequency_penalty is inf; allowed: -2 to 2"),
    "bias": (text_request(logit_bias={5: 101.0}), "logit_bias of token 5 is 101.0; allowed: -100 to 100"),
    "bias of no token": (text_request(logit_bias={99999: 1.0}), "logit_bias has 99999; allowed: 0 to"),
    "many biases": (
        text_request(logit_bias=dict.fromkeys(range(1025), 0.0)),
        "logit_bias has 1025 entries; allowed: at most 1024",
    ),
    "max_tokens 0": (text_request(max_tokens=0), "max_tokens is 0; allowed: 1 or more"),
    "many logprobs": (text_request(top_logprobs=21), "top_logprobs is 21; allowed: 0 to 20"),
    "many stop strings": (text_request(stop_strings=["x"] * 17), "stop_strings has 17 entries; allowed: at most 16"),
    "many stop tokens": (text_request(stop_token_ids=[1] * 1025), "stop_token_ids has 1025 entries; allowed: at most"),
    "many messages": (
        inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage()] * 4097)),
        "prompt.chat.messages has 4097 entries; allowed: at most 4096",
    ),
    "empty stop string": (text_request(stop_strings=["a", ""]), "stop_strings has a string of 0 characters"),
    "long stop string": (text_request(stop_strings=["x" * 1025]), "stop_strings has a string of 1025 characters"),
    "unknown stop token": (text_request(stop_token_ids=[99999]), "stop_token_ids has 99999; allowed: 0 to"),
}


def test_bad_requests_are_refused_with_field_value_and_range(node: Node) -> None:
    async def scenario(server: Serving) -> dict[str, grpc.aio.AioRpcError]:
        errors = {name: await refusal(server, request) for name, (request, _) in BAD_REQUESTS.items()}
        assert len(ids_of(await generate(server, text_request(max_tokens=2)))) == 2
        return errors

    for name, error in node.run(scenario).items():
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
        assert BAD_REQUESTS[name][1] in str(error.details()), name


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('Only user and assistant roles.') }}", "Only user and assistant"),
    ],
)
def test_chats_that_the_model_cannot_have_are_refused(
    engine: Engine, tmp_path: Path, template: str | None, sentence: str
) -> None:
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="robot", content="hi")])
    error = Node(engine, tokenizer).run(lambda server: refusal(server, inference_pb2.GenerateRequest(chat=chat)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in str(error.details())


def test_tokens_that_do_not_exist_are_refused(node: Node) -> None:
    async def scenario(server: Serving) -> list[grpc.aio.AioRpcError]:
        errors = []
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[12345]))
        errors.append(refused.value)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.stub.Tokenize(inference_pb2.TokenizeRequest())
        errors.append(refused.value)
        return errors

    errors = node.run(scenario)
    assert [error.code() for error in errors] == [grpc.StatusCode.INVALID_ARGUMENT] * 2
    assert [str(error.details()).split(";")[0] for error in errors] == ["token_ids has 12345", "input is not set"]
