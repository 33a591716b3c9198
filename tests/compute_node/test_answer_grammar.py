"""Grammars: what they allow comes, what they cannot enforce is refused, engines keep to them."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from compute_node.answer_grammar import AnswerGrammar, GrammarCompiler
from compute_node.engine import EngineKind, EngineRequest
from compute_node.sampling import Sampling
from promoe.errors import InternalError
from tests.compute_node.tiny_serving import load_tokenizer, started_engine, submit
from tests.families import END_OF_TURN_ID, VOCABULARY, make_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
    "required": ["size", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(VOCABULARY), frozenset({END_OF_TURN_ID}))


@pytest.mark.parametrize("kind", list(EngineKind), ids=lambda kind: kind.value)
def test_engines_keep_to_it(kind: EngineKind, compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    """A greedy request is no plain argmax then, and its neighbour without a grammar is left alone."""
    grammar = AnswerGrammar.of_json_schema(SCHEMA, "response_format")
    bound, sampled = asyncio.run(compiler.compile(grammar, 2))
    stops = frozenset({END_OF_TURN_ID})
    with started_engine(kind, make_tiny_model("qwen2_moe")) as engine:
        alone = submit(engine, EngineRequest("alone", (5, 6), 8, Sampling(), frozenset())).token_ids()
        logs = [
            submit(engine, EngineRequest("bound", (5, 6), 300, Sampling(), stops, bound)),
            submit(engine, EngineRequest("sampled", (5, 6), 300, Sampling(temperature=1.0, seed=4), stops, sampled)),
            submit(engine, EngineRequest("free", (5, 6), 8, Sampling(), frozenset())),
        ]
        *answers, free = [log.token_ids() for log in logs]
    assert free == alone
    # A tiny model may well stay in white space; where it came to an end, all is there.
    for ids in answers:
        text = str(tokenizer.decode(ids))
        if len(ids) < 300:
            document = json.loads(text)
            assert 0 <= document["size"] <= 99
            assert document["kind"] in ("a", "b")
        assert text.startswith("{")


def test_only_the_end_may_come_when_all_is_there(compiler: GrammarCompiler) -> None:
    (constraint,) = asyncio.run(compiler.compile(AnswerGrammar.of_lark('start: "he"', "x"), 1))
    token_id = VOCABULARY.index("he")
    scores_V = torch.zeros(len(VOCABULARY))
    allowed = torch.isfinite(constraint.forbid(scores_V)).nonzero().flatten().tolist()
    assert allowed == [token_id]
    constraint.accept(token_id)
    assert torch.isfinite(constraint.forbid(scores_V)).nonzero().flatten().tolist() == [END_OF_TURN_ID]


def test_a_token_that_may_not_come_ends_the_answer(compiler: GrammarCompiler) -> None:
    (constraint,) = asyncio.run(compiler.compile(AnswerGrammar.of_lark('start: "he"', "x"), 1))
    with pytest.raises(InternalError, match="grammar cannot go on"):
        constraint.accept(VOCABULARY.index("s"))


@pytest.mark.parametrize(
    "grammar",
    [
        AnswerGrammar.of_json_schema({"type": "nothing"}, "response_format"),
        AnswerGrammar.of_json_schema({"type": "object", "minProperties": -1, "not": {}}, "response_format"),
        AnswerGrammar.of_lark("start: other", "response_format"),
    ],
)
def test_what_cannot_be_enforced_is_refused(compiler: GrammarCompiler, grammar: AnswerGrammar) -> None:
    with pytest.raises(ValueError, match=r"^response_format cannot be enforced: "):
        asyncio.run(compiler.compile(grammar, 1))


def test_a_model_without_an_end_cannot_be_held_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    endless = GrammarCompiler(tokenizer, len(VOCABULARY), frozenset())
    with pytest.raises(ValueError, match="x cannot be enforced with this model's tokenizer"):
        asyncio.run(endless.compile(AnswerGrammar.of_lark('start: "he"', "x"), 1))
