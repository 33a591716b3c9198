"""The Inference service through a real server and socket, over a tiny model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compute_node.engine import Engine
from promoe.v1 import inference_pb2
from tests.compute_node.tiny_serving import Serving, continuous_engine, greedy_oracle, load_tokenizer, serving
from tests.families import make_tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> Iterator[Engine]:
    with continuous_engine(model) as started:
        yield started


async def generate(server: Serving, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in server.stub.Generate(request, timeout=60)]


def text_of(responses: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(response.delta.text for response in responses)


def ids_of(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.delta.token_ids]


def test_greedy_text_streams_token_by_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Engine
) -> None:
    async def scenario() -> list[inference_pb2.GenerateResponse]:
        async with serving(engine, tokenizer) as server:
            sampling = inference_pb2.SamplingParams(max_tokens=12, ignore_eos=True)
            return await generate(server, inference_pb2.GenerateRequest(text="then the", sampling=sampling))

    responses = asyncio.run(scenario())
    prompt_ids = tokenizer("then the")["input_ids"]
    oracle = greedy_oracle(model, prompt_ids, 12)
    assert [response.WhichOneof("event") for response in responses[:2]] == ["accepted", "delta"]
    assert responses[0].accepted.prompt_tokens == len(prompt_ids)
    assert ids_of(responses) == oracle
    assert text_of(responses) == tokenizer.decode(oracle, skip_special_tokens=True)
    finish = responses[-1].finish
    assert finish.reason == inference_pb2.FINISH_REASON_MAX_TOKENS
    assert finish.usage.output_tokens == 12
    assert 0 < finish.usage.queue_s < finish.usage.ttft_s
    assert finish.usage.tpot_s > 0
