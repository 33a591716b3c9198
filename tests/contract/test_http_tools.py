"""Tool calls with OpenAI's own client: an agent's whole turn, and calls that must be made."""

import json
from collections.abc import Iterator
from typing import cast

import pytest
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolParam,
)
from transformers import PreTrainedTokenizerBase

from tests.http_node import MODEL, HttpNode, ScriptEngine, http_node

WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QUESTION: ChatCompletionMessageParam = {"role": "user", "content": "Is it warm in Rome?"}


@pytest.fixture(scope="module")
def engine(tool_tokenizer: PreTrainedTokenizerBase) -> ScriptEngine:
    return ScriptEngine(tool_tokenizer)


@pytest.fixture(scope="module")
def node(engine: ScriptEngine, tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(engine, tool_tokenizer, max_context_tokens=2000) as running:
        yield running


def prompt_of(engine: ScriptEngine, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(engine.requests[-1].prompt_ids)))


def only_call(answer: ChatCompletion) -> ChatCompletionMessageFunctionToolCall:
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    assert calls[0].type == "function"
    return calls[0]


def test_an_agents_turn(node: HttpNode, engine: ScriptEngine, tool_tokenizer: PreTrainedTokenizerBase) -> None:
    engine.script = f"Let me look.\n{CALL}"
    messages: list[ChatCompletionMessageParam] = [QUESTION]
    with node.client() as client:
        asked = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        choice = asked.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look."
        call = only_call(asked)
        assert json.loads(call.function.arguments) == {"city": "Rome"}
        assert '"name": "weather"' in prompt_of(engine, tool_tokenizer)
        # The client's own message goes back as it is, with all that it has and has not.
        messages.append(cast("ChatCompletionMessageParam", choice.message))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "21 degrees"})
        engine.script = "Yes, it is."
        told = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    assert told.choices[0].message.content == "Yes, it is."
    assert told.choices[0].finish_reason == "stop"
    assert told.choices[0].message.tool_calls is None
    prompt = prompt_of(engine, tool_tokenizer)
    assert f"assistant\nLet me look.{CALL}" in prompt
    assert "tool\n21 degrees" in prompt


def test_calls_are_streamed_as_deltas(node: HttpNode, engine: ScriptEngine) -> None:
    engine.script = f"{CALL}\n{CALL.replace('Rome', 'Oslo')}"
    with node.client() as client:
        stream = client.chat.completions.create(model=MODEL, messages=[QUESTION], tools=[WEATHER], stream=True)
        pieces = [piece.choices[0] for piece in stream]
    deltas = [delta for piece in pieces for delta in piece.delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == [0, 1]
    assert [json.loads((delta.function and delta.function.arguments) or "")["city"] for delta in deltas] == [
        "Rome",
        "Oslo",
    ]
    assert len({delta.id for delta in deltas}) == 2
    assert "".join(piece.delta.content or "" for piece in pieces) == ""
    assert pieces[-1].finish_reason == "tool_calls"


def test_the_clients_own_accumulator_understands_the_stream(node: HttpNode, engine: ScriptEngine) -> None:
    engine.script = f"So: {CALL}"
    with (
        node.client() as client,
        client.chat.completions.stream(model=MODEL, messages=[QUESTION], tools=[WEATHER]) as stream,
    ):
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.content == "So:"
    assert [call.function.name for call in message.tool_calls or ()] == ["weather"]


def test_one_call_at_a_time_ends_behind_the_first(node: HttpNode, engine: ScriptEngine) -> None:
    engine.script = f"{CALL}\n{CALL}"
    with node.client() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[QUESTION], tools=[WEATHER], parallel_tool_calls=False
        )
    assert len(answer.choices[0].message.tool_calls or ()) == 1
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_tools_are_shown_and_none_are_read_when_none_is_asked_for(
    node: HttpNode, engine: ScriptEngine, tool_tokenizer: PreTrainedTokenizerBase
) -> None:
    engine.script = CALL
    with node.client() as client:
        answer = client.chat.completions.create(model=MODEL, messages=[QUESTION], tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert "weather" not in prompt_of(engine, tool_tokenizer)


def test_a_call_that_was_cut_off_is_text(node: HttpNode, engine: ScriptEngine) -> None:
    engine.script = CALL
    with node.client() as client:
        answer = client.chat.completions.create(model=MODEL, messages=[QUESTION], tools=[WEATHER], max_tokens=20)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.choices[0].message.content or "").startswith("<tool_call>")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_model_of_random_weights_makes_the_call_that_it_must(
    live: HttpNode, choice: ChatCompletionToolChoiceOptionParam
) -> None:
    with live.client() as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=3,
        )
    assert json.loads(only_call(answer).function.arguments)["city"] in ("Rome", "Oslo")
    assert answer.choices[0].finish_reason == "tool_calls"
