"""What the Inference service's contract tests share: a tiny model behind either engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compute_node.admission import AdmissionLimits
from compute_node.engine import Engine, EngineKind
from tests.compute_node.tiny_serving import continuous_engine, load_tokenizer, started_engine
from tests.contract.inference_node import Node
from tests.families import make_tiny_model
from tests.http_node import TOOL_TEMPLATE, HttpNode, http_node


@pytest.fixture(scope="module")
def tiny_model() -> PreTrainedModel:
    return make_tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    """The same weights, out of reach of the engines."""
    return make_tiny_model("qwen2_moe")


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", params=list(EngineKind), ids=lambda kind: kind.value)
def engine(request: pytest.FixtureRequest, tiny_model: PreTrainedModel, oracle: PreTrainedModel) -> Iterator[Engine]:
    with started_engine(request.param, tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def node(engine: Engine, tiny_tokenizer: PreTrainedTokenizerBase) -> Node:
    return Node(engine, tiny_tokenizer)


@pytest.fixture(scope="session")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """With a chat template that has tools."""
    tokenizer = load_tokenizer(Path(tmp_path_factory.mktemp("tool-tokenizer")))
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def live(tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    """The HTTP API over a tiny model that computes."""
    limits = AdmissionLimits(max_concurrent_requests=8, max_queued_requests=16, request_deadline_s=60.0)
    with continuous_engine(make_tiny_model("qwen2_moe")) as engine, http_node(engine, tool_tokenizer, limits) as node:
        yield node
