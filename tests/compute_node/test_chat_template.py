"""Chats through templates: what they can say, and what they would have left out."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from compute_node.chat_template import ChatTemplate, ChatTurn, ToolCall
from tests.compute_node.tiny_serving import load_tokenizer
from tests.families import CHAT_TEMPLATE
from tests.http_node import TOOL_TEMPLATE

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALLING = ChatTurn("assistant", "", (ToolCall("c1", "clock", '{"zone": "\u00fc"}'),))


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tmp_path)


def template(tokenizer: PreTrainedTokenizerBase, source: object) -> ChatTemplate:
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def test_tools_calls_and_their_answers_are_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [ChatTurn("user", "late?"), CALLING, ChatTurn("tool", "noon", tool_call_id="c1")]
    text = template(tokenizer, TOOL_TEMPLATE).render(turns, [TOOL])
    assert '"name": "clock"' in text.partition("<|im_end|>")[0]
    assert '<tool_call>\n{"name": "clock", "arguments": {"zone": "\u00fc"}}\n</tool_call>' in text
    assert text.endswith("<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("source", "takes_tools"),
    [
        (TOOL_TEMPLATE, True),
        (CHAT_TEMPLATE, False),
        (None, False),
        ("{% set tools = [] %}{{ tools }}{{ messages }}", False),
        ("{% generation %}{{ tools }}{% endgeneration %}", True),
        ({"default": CHAT_TEMPLATE, "tool_use": TOOL_TEMPLATE}, True),
    ],
)
def test_whether_tools_have_a_place(tokenizer: PreTrainedTokenizerBase, source: object, takes_tools: bool) -> None:
    assert template(tokenizer, source).takes_tools == takes_tools


@pytest.mark.parametrize(
    ("turns", "tools", "sentence"),
    [
        ([ChatTurn("user", "x")], [TOOL], "tools is set, but this model's chat template has no place for tools"),
        ([CALLING], [], "prompt.chat has tool calls, but"),
        ([ChatTurn("tool", "x")], [], "prompt.chat has an answer of a tool, but"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(
    tokenizer: PreTrainedTokenizerBase, turns: list[ChatTurn], tools: list[dict[str, object]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        template(tokenizer, CHAT_TEMPLATE).render(turns, tools)
