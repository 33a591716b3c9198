"""Calls in answers: found however the text is cut, and enforced where they must be."""

import asyncio
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from compute_node.answer_grammar import GrammarCompiler
from compute_node.chat_template import ToolCall
from compute_node.tool_calls import (
    TOOL_CALL_FORMATS,
    AnswerPiece,
    Tool,
    ToolCallScanner,
    ToolUse,
    ToolWish,
    format_of,
)
from tests.compute_node.tiny_serving import load_tokenizer
from tests.families import CHAT_TEMPLATE, END_OF_TURN_ID, VOCABULARY
from tests.http_node import TOOL_TEMPLATE

HERMES = TOOL_CALL_FORMATS["hermes"]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER = Tool(
    "weather",
    "Tells it.",
    {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    is_strict=True,
)
CLOCK = Tool("clock", None, {"type": "object", "properties": {}, "additionalProperties": False}, is_strict=False)


def scanned(text: str, cuts: list[int] | None = None) -> list[AnswerPiece]:
    """The text in pieces, joined again where text follows text."""
    places = sorted({0, len(text), *(cut for cut in cuts or () if cut < len(text))})
    scanner = ToolCallScanner(HERMES)
    pieces: list[AnswerPiece] = []
    for start, end in itertools.pairwise(places):
        pieces += scanner.push(text[start:end])
    pieces += scanner.flush()
    joined: list[AnswerPiece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def calls_in(pieces: list[AnswerPiece]) -> list[tuple[str, object]]:
    return [(piece.name, json.loads(piece.arguments_json)) for piece in pieces if isinstance(piece, ToolCall)]


def without_ids(pieces: list[AnswerPiece]) -> list[object]:
    return [
        (piece.name, json.loads(piece.arguments_json)) if isinstance(piece, ToolCall) else piece for piece in pieces
    ]


ROME = ("weather", {"city": "Rome"})
TEXTS = {
    "no call": ("Just text, with < and <tool.", ["Just text, with < and <tool."]),
    "one call": (CALL, [ROME]),
    "text before": (f"Let me see.\n\n{CALL}", ["Let me see.", ROME]),
    "text after": (f"{CALL}\nThat is it. Yes.\n", [ROME, "That is it. Yes.\n"]),
    "two calls": (f"{CALL}\n{CALL}", [ROME, ROME]),
    "no end": (CALL.removesuffix("</tool_call>"), [ROME]),
    "cut off": ('<tool_call>\n{"name": "wea', ['<tool_call>\n{"name": "wea']),
    "no JSON": ("<tool_call>what?</tool_call> So.", ["<tool_call>what?</tool_call> So."]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ['<tool_call>{"arguments": {}}</tool_call>']),
    "no arguments": ('<tool_call>{"name": "clock"}</tool_call>', [("clock", {})]),
    "no object": (
        '<tool_call>{"name": "clock", "arguments": 3}</tool_call>',
        ['<tool_call>{"name": "clock", "arguments": 3}</tool_call>'],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_told_from_text(name: str) -> None:
    text, expected = TEXTS[name]
    assert without_ids(scanned(text)) == expected


@given(name=st.sampled_from(sorted(TEXTS)), cuts=st.lists(st.integers(1, 150), max_size=12))
def test_it_does_not_matter_how_the_text_is_cut(name: str, cuts: list[int]) -> None:
    text, expected = TEXTS[name]
    assert without_ids(scanned(text, cuts)) == expected


def test_every_call_has_an_id_of_its_own() -> None:
    ids = [piece.call_id for piece in scanned(f"{CALL}\n{CALL}") if isinstance(piece, ToolCall)]
    assert len(set(ids)) == 2


def test_text_is_held_back_only_while_it_may_begin_a_call() -> None:
    scanner = ToolCallScanner(HERMES)
    assert scanner.push("a <tool_") == ["a"]
    assert scanner.push("box> b") == [" <tool_box> b"]


def test_the_format_is_told_by_the_template() -> None:
    assert format_of(TOOL_TEMPLATE) is HERMES
    assert format_of(CHAT_TEMPLATE) is None
    assert format_of(None) is None
    assert format_of("<tool_call><function=name> arguments") is None
    assert format_of("<tool_call>\n<function=name>\n<parameter=key>\n") is TOOL_CALL_FORMATS["qwen3_coder"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n", ("weather", {"city": "Rome"})),
        ("<function=clock></function>", ("clock", {})),
        ("<function=set>\n<parameter=n>\n3\n</parameter>\n<parameter=s>\n3\n</parameter>", ("set", {"n": 3, "s": "3"})),
        ("<function=set>\n<parameter=l>\n[1, 2]\n</parameter>\n</function>", ("set", {"l": [1, 2]})),
        ("<function=set>\n<parameter=s>\na\n\nb\n</parameter>\n</function>", ("set", {"s": "a\n\nb"})),
        ("<function=other>\n<parameter=x>\nnot JSON\n</parameter>\n</function>", ("other", {"x": "not JSON"})),
        ('{"name": "weather"}', None),
    ],
)
def test_tagged_arguments_have_the_types_of_their_schema(text: str, expected: tuple[str, object] | None) -> None:
    properties = {"n": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}}
    tools = (WEATHER, CLOCK, Tool("set", None, {"type": "object", "properties": properties}, is_strict=False))
    tagged = TOOL_CALL_FORMATS["qwen3_coder"]
    scanner = ToolCallScanner(tagged, tools)
    pieces = [*scanner.push(f"{tagged.begin}{text}{tagged.end}"), *scanner.flush()]
    assert calls_in(pieces) == ([] if expected is None else [expected])


def test_tagged_calls_cannot_be_enforced() -> None:
    tagged = TOOL_CALL_FORMATS["qwen3_coder"]
    assert tagged.grammar(ToolWish((CLOCK,), ToolUse.AUTO, is_parallel=True)) is None
    with pytest.raises(ValueError, match="tool_choice is required, which cannot be enforced"):
        tagged.grammar(ToolWish((CLOCK,), ToolUse.REQUIRED, is_parallel=True))
    with pytest.raises(ValueError, match="tools has a strict function, which cannot be enforced"):
        tagged.grammar(ToolWish((WEATHER,), ToolUse.AUTO, is_parallel=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(VOCABULARY), frozenset({END_OF_TURN_ID}))


def random_answer(
    wish: ToolWish, compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, seed: int, favoured: str = ""
) -> str | None:
    """What a model of random logits says within the grammar; None when it came to no end.

    `favoured` is what it would like to say as long as the grammar allows it.
    """
    grammar = HERMES.grammar(wish)
    assert grammar is not None
    (constraint,) = asyncio.run(compiler.compile(grammar, 1))
    generator = torch.Generator().manual_seed(seed)
    liked: list[int] = tokenizer(favoured)["input_ids"] if favoured else []
    ids: list[int] = []
    while len(ids) < 400:
        scores_V = torch.randn(len(VOCABULARY), generator=generator)
        scores_V[END_OF_TURN_ID] += 3
        if len(ids) < len(liked):
            scores_V[liked[len(ids)]] += 100
        token_id = int(constraint.forbid(scores_V).argmax())
        constraint.accept(token_id)
        if token_id == END_OF_TURN_ID:
            return str(tokenizer.decode(ids))
        ids.append(token_id)
    return None


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_made_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    for wish in (
        ToolWish((WEATHER, CLOCK), ToolUse.REQUIRED, is_parallel=False),
        ToolWish((WEATHER, CLOCK), ToolUse.NAMED, is_parallel=False, named="weather"),
        ToolWish((WEATHER, CLOCK), ToolUse.REQUIRED, is_parallel=True),
    ):
        text = random_answer(wish, compiler, tokenizer, seed)
        assert text is not None
        pieces = scanned(text)
        assert all(isinstance(piece, ToolCall) for piece in pieces), text
        assert pieces if wish.is_parallel else len(pieces) == 1
        for name, arguments in calls_in(pieces):
            assert name in ((wish.named,) if wish.named else ("weather", "clock"))
            assert arguments in ({}, {"city": "Rome"}, {"city": "Oslo"})


def test_strict_arguments_are_kept_to_in_an_answer_that_is_free(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerBase
) -> None:
    wish = ToolWish((WEATHER, CLOCK), ToolUse.AUTO, is_parallel=True)
    text = random_answer(wish, compiler, tokenizer, 1, "Well.\n<tool_call>\n" + '{"name": "weather", "arguments": {"x')
    assert text is not None
    said, call = without_ids(scanned(text))[:2]
    assert said == "Well."
    assert call in (("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"}))
    free = random_answer(wish, compiler, tokenizer, 2, "No call at all")
    assert free is not None
    assert free.startswith("No call at all")


def test_free_answers_without_strict_tools_have_no_grammar() -> None:
    assert HERMES.grammar(ToolWish((CLOCK,), ToolUse.AUTO, is_parallel=True)) is None
