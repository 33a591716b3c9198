"""What answers look like on the wire, event by event, without a server."""

import json
import math
from pathlib import Path

import pytest

from compute_node.answer import Delta, Finish, FinishReason, Usage
from compute_node.http.answer_wire import ServedModel, TokenTexts, UsageCount, new_head
from compute_node.http.api_error import param_of, status_and_body
from compute_node.http.chat_wire import ChatChoice
from compute_node.http.completion_wire import TextChoice
from compute_node.http.event_stream import event
from compute_node.prompt import PromptCodec, PromptLimits
from compute_node.sampling import Alternative, SampledToken
from compute_node.step_ledger import RequestUse
from compute_node.tool_calls import TOOL_CALL_FORMATS, ToolCallScanner
from promoe.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    PromoeError,
    ResourceExhausted,
    Unavailable,
)
from tests.compute_node.tiny_serving import SPEC, load_tokenizer
from tests.families import VOCABULARY


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenTexts:
    tokenizer = load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))
    return TokenTexts(PromptCodec(tokenizer, PromptLimits(len(VOCABULARY), 100, 1000)))


def finish(reason: FinishReason) -> Finish:
    return Finish(reason, None, None, Usage(3, 5, 0.1, None, 0.0, RequestUse()))


def drawn(text: str, token_id: int, logprob: float | None = None) -> Delta:
    alternatives = () if logprob is None else (Alternative(token_id, logprob), Alternative(3, -math.inf))
    return Delta(text, SampledToken(token_id, logprob, alternatives))


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (FinishReason.END_OF_SEQUENCE, "stop"),
        (FinishReason.STOP_STRING, "stop"),
        (FinishReason.STOP_TOKEN, "stop"),
        (FinishReason.MAX_TOKENS, "length"),
        (FinishReason.CONTEXT_FULL, "length"),
    ],
)
def test_every_reason_has_a_word(texts: TokenTexts, reason: FinishReason, word: str) -> None:
    chat, text = ChatChoice(0, None, texts), TextChoice(0, "", False, texts)
    assert [chunk["finish_reason"] for chunk in chat.take(finish(reason))] == [word]
    assert [chunk["finish_reason"] for chunk in text.take(finish(reason))] == [word]
    assert chat.document()["finish_reason"] == text.document()["finish_reason"] == word


def test_a_log_probability_without_text_is_sent_all_the_same(texts: TokenTexts) -> None:
    chat = ChatChoice(0, None, texts)
    (chunk,) = chat.take(drawn("", 70, -0.5))
    assert chunk["delta"] == {"content": ""}
    logprobs = chunk["logprobs"]
    assert isinstance(logprobs, dict)
    assert logprobs["content"][0]["logprob"] == -0.5
    assert chat.take(Delta("", None)) == []


def test_json_has_no_infinity(texts: TokenTexts) -> None:
    chat, text = ChatChoice(0, None, texts), TextChoice(0, "", True, texts)
    for chunk in (*chat.take(drawn("x", 70, -math.inf)), *text.take(drawn("x", 70, -math.inf))):
        assert json.loads(json.dumps(chunk, allow_nan=False))
        assert "-9999.0" in json.dumps(chunk)


def test_text_that_is_all_call_has_no_content(texts: TokenTexts) -> None:
    chat = ChatChoice(0, ToolCallScanner(TOOL_CALL_FORMATS["hermes"]), texts)
    for piece in ("<tool_", 'call>{"name": "f", "arguments"', ": {}}</tool", "_call>"):
        chat.take(Delta(piece, None))
    chat.take(finish(FinishReason.END_OF_SEQUENCE))
    document = chat.document()
    assert document["finish_reason"] == "tool_calls"
    message = document["message"]
    assert isinstance(message, dict)
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_a_call_in_an_answer_that_was_cut_off_is_still_a_call(texts: TokenTexts) -> None:
    chat = ChatChoice(0, ToolCallScanner(TOOL_CALL_FORMATS["hermes"]), texts)
    chat.take(Delta('<tool_call>{"name": "f"}</tool_call> and so', None))
    *_, last = chat.take(finish(FinishReason.MAX_TOKENS))
    assert last["finish_reason"] == "length"


def test_echo_is_in_the_text_and_moves_the_offsets(texts: TokenTexts) -> None:
    choice = TextChoice(2, "so ", True, texts)
    assert [chunk["text"] for chunk in choice.first_chunks()] == ["so "]
    choice.take(drawn("x", 70, -1.0))
    (chunk,) = choice.take(drawn("y", 71, -2.0))
    assert isinstance(chunk["logprobs"], dict)
    assert chunk["logprobs"]["text_offset"] == [4]
    document = choice.document()
    assert (document["index"], document["text"]) == (2, "so xy")
    assert isinstance(document["logprobs"], dict)
    assert document["logprobs"]["token_logprobs"] == [-1.0, -2.0]


def test_usage_counts_the_prompt_once() -> None:
    usage = UsageCount(7)
    for _ in range(3):
        usage.add(finish(FinishReason.MAX_TOKENS))
    assert usage.document() == {"prompt_tokens": 7, "completion_tokens": 15, "total_tokens": 22}


def test_heads_have_ids_of_their_own() -> None:
    model = ServedModel.of(SPEC, 256)
    first, second = (new_head("chat.completion", "chatcmpl", model) for _ in range(2))
    assert first["id"] != second["id"]
    assert (first["model"], first["system_fingerprint"]) == ("tiny", f"fp_{SPEC.fingerprint}")


def test_an_event_is_one_line() -> None:
    assert event({"text": "a\nb\u00e9"}) == b'data: {"text":"a\\nb\xc3\xa9"}\n\n'


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("top_p is 2; allowed: up to 1"), 400),
        (InvalidInput("No."), 400),
        (ModelNotFound("No."), 404),
        (Overloaded("No."), 429),
        (Unavailable("No."), 503),
        (ResourceExhausted("No."), 503),
        (DeadlineExceeded("No."), 504),
        (InternalError("No."), 500),
        (PromoeError("No."), 500),
    ],
)
def test_errors_have_a_status_and_openais_shape(error: PromoeError | ValueError, status: int) -> None:
    found, body = status_and_body(error)
    assert found == status
    assert set(body) == {"error"}
    assert isinstance(body["error"], dict)
    assert body["error"]["message"] == str(error)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("top_p is 2; allowed: up to 1", "top_p"),
        ("stop_strings has a string of 0 characters", "stop"),
        ("prompt.chat is not what the template allows", "messages"),
        ("prompt.token_ids has 9", "prompt"),
        ("The model is away.", None),
        ("'utf-8' codec", None),
    ],
)
def test_the_field_is_what_a_sentence_begins_with(message: str, param: str | None) -> None:
    assert param_of(message) == param
