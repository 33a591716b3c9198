"""Prompts in, tokens out, and every prompt that is refused."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.chat_template import ChatTurn
from compute_node.prompt import ChatPrompt, Prompt, PromptCodec, PromptLimits, TextPrompt, TokenPrompt
from tests.compute_node.tiny_serving import load_tokenizer
from tests.families import VOCABULARY

LIMITS = PromptLimits(vocab_size=len(VOCABULARY), max_context_tokens=50, max_prompt_bytes=400)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> PromptCodec:
    return PromptCodec(load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))), LIMITS)


@given(text=st.text(max_size=30))
def test_any_text_comes_back(codec: PromptCodec, text: str) -> None:
    token_ids = asyncio.run(codec.tokenize(TextPrompt("x" + text)))
    assert asyncio.run(codec.detokenize(token_ids)) == "x" + text
    assert all(codec.token_text(token_id) for token_id in token_ids)


def test_a_chat_is_rendered_with_the_template(codec: PromptCodec) -> None:
    chat = ChatPrompt((ChatTurn("system", "be kind"), ChatTurn("user", "hello")))
    rendered = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert asyncio.run(codec.encode(chat)) == asyncio.run(codec.tokenize(TextPrompt(rendered)))


def test_special_tokens_are_shown_only_where_one_token_is_shown(codec: PromptCodec) -> None:
    assert codec.decode([2]) == ""
    assert codec.token_text(2) == "<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (TextPrompt(""), "prompt is empty"),
        (ChatPrompt(()), "prompt is empty"),
        (TokenPrompt(()), "prompt is empty"),
        (TextPrompt("x" * 50), r"prompt has 50 tokens; allowed: fewer than the context's 50"),
        (TokenPrompt((5,) * 51), r"prompt has 51 tokens; allowed: fewer than the context's 50"),
        (TextPrompt("x" * 401), "prompt has 401 bytes or more; allowed: at most 400"),
        (TextPrompt("a\ud800"), r"prompt has '\\ud800', which is half a character"),
        (TextPrompt("\u00e9" * 201), "prompt has 402 bytes or more; allowed: at most 400"),
        (ChatPrompt((ChatTurn("user", "x" * 401),)), "prompt has 401 bytes or more; allowed: at most 400"),
        (TokenPrompt((5, len(VOCABULARY))), f"token_ids has {len(VOCABULARY)}; allowed: 0 to {len(VOCABULARY) - 1}"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(codec: PromptCodec, prompt: Prompt, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asyncio.run(codec.encode(prompt))


def test_the_longest_prompt_leaves_room_for_one_token(codec: PromptCodec) -> None:
    assert len(asyncio.run(codec.encode(TextPrompt("x" * 49)))) == 49


def test_unknown_tokens_are_not_detokenized(codec: PromptCodec) -> None:
    with pytest.raises(ValueError, match=r"token_ids has 100000; allowed: 0 to"):
        asyncio.run(codec.detokenize([1, 100000]))


def test_more_tokens_than_any_prompt_has_are_not_detokenized(codec: PromptCodec) -> None:
    most = codec.limits.max_prompt_bytes
    assert asyncio.run(codec.detokenize([5] * most))
    with pytest.raises(ValueError, match=f"token_ids has {most + 1} entries; allowed: at most {most}"):
        asyncio.run(codec.detokenize([5] * (most + 1)))


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; allowed: text or token_ids"):
        asyncio.run(PromptCodec(tokenizer, LIMITS).encode(ChatPrompt((ChatTurn("user", "hi"),))))


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "allows: Roles must alternate."),
        ("{{ messages[0]['name'].upper() }}", "allows: .*name"),
    ],
)
def test_the_templates_own_complaint_is_passed_on(tmp_path: Path, template: str, sentence: str) -> None:
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=sentence):
        asyncio.run(PromptCodec(tokenizer, LIMITS).encode(ChatPrompt((ChatTurn("robot", "hi"),))))


def test_the_event_loop_goes_on_while_a_long_text_is_tokenized(tmp_path: Path) -> None:
    codec = PromptCodec(load_tokenizer(tmp_path), PromptLimits(len(VOCABULARY), 10**9, 10**9))

    async def scenario() -> tuple[int, int]:
        tokenizing = asyncio.create_task(codec.tokenize(TextPrompt("the sand and the sea " * 20_000)))
        num_turns = 0
        while not tokenizing.done():
            num_turns += 1
            await asyncio.sleep(0)
        return num_turns, len(await tokenizing)

    num_turns, num_tokens = asyncio.run(scenario())
    assert num_tokens > 100_000
    # On the loop itself it would be done at the second turn.
    assert num_turns > 10
