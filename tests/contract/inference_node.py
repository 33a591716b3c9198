"""A server over a tiny model for the Inference service's contract tests, and short ways to call it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import grpc
import grpc.aio
import pytest
from transformers import PreTrainedTokenizerBase

from compute_node.admission import AdmissionLimits
from compute_node.engine import Engine
from compute_node.prompt import PromptLimits
from promoe.v1 import inference_pb2
from tests.compute_node.tiny_serving import Serving, serving
from tests.families import VOCABULARY

CONTEXT = 256
PROMPT = "then the sand"

_T = TypeVar("_T")
Scenario: TypeAlias = Callable[[Serving], Awaitable[_T]]


class Node:
    """Runs scenarios against a fresh server over the shared engine."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self.tokenizer = tokenizer

    def run(self, scenario: Scenario[_T], limits: AdmissionLimits | None = None) -> _T:
        async def whole() -> _T:
            prompt_limits = PromptLimits(len(VOCABULARY), CONTEXT, 4096)
            async with serving(self.engine, self.tokenizer, limits, prompt_limits) as server:
                return await scenario(server)

        return asyncio.run(asyncio.wait_for(whole(), 120))

    def ids(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text)["input_ids"]
        return token_ids


def text_request(text: str = PROMPT, /, **params: object) -> inference_pb2.GenerateRequest:
    """Goes on past the end of sequence unless told otherwise: tiny models end where they like."""
    sampling = inference_pb2.SamplingParams(**({"ignore_eos": True} | params))  # type: ignore[arg-type]
    return inference_pb2.GenerateRequest(text=text, sampling=sampling)


async def generate(server: Serving, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in server.stub.Generate(request, timeout=60)]


async def refusal(server: Serving, request: inference_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generate(server, request)
    return refused.value


def text_of(responses: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(response.delta.text for response in responses)


def ids_of(responses: list[inference_pb2.GenerateResponse]) -> list[int]:
    return [token_id for response in responses for token_id in response.delta.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until `condition` holds; the scenario's own deadline ends a wait that is in vain."""
    while not condition():
        await asyncio.sleep(0.001)
