"""What the HTTP API refuses: with OpenAI's error shape, naming the field, and never by leaving something out."""

import json
from pathlib import Path

import httpx2
import openai
import pytest

from compute_node.admission import AdmissionLimits
from tests.compute_node.tiny_serving import load_tokenizer
from tests.http_node import MODEL, TIMEOUT_S, HeldEngine, HttpNode, http_node

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": MODEL, "prompt": "x"}

BAD_CHATS: dict[str, tuple[dict[str, object], str, str | None]] = {
    "unknown field": ({"foo": 1}, "foo is not supported.", "foo"),
    "unknown field that is no name": ({"my-field": 1}, "my-field is not supported.", "my-field"),
    "unknown field with a capital": ({"Temperature": 1}, "Temperature is not supported.", "Temperature"),
    "empty message": (
        {"messages": [{"role": "user"}]}, "prompt is empty; allowed: a text, a chat with text", "messages",
    ),
    "audio": ({"audio": {"voice": "alloy"}}, "audio is not supported.", "audio"),
    "modalities": ({"modalities": ["text", "audio"]}, 'modalities[1] is "audio"; expected \'text\'.', "modalities[1]"),
    "functions": ({"functions": [{"name": "f"}]}, "functions is not supported.", "functions"),
    "reasoning": ({"reasoning_effort": "high"}, "reasoning_effort is not supported.", "reasoning_effort"),
    "store": ({"store": True}, "store is true; expected false.", "store"),
    "service tier": ({"service_tier": "flex"}, 'service_tier is "flex"; expected', "service_tier"),
    "temperature": ({"temperature": 7}, "temperature is 7.0; allowed: 0 to 5.0", "temperature"),
    "temperature text": ({"temperature": "1"}, 'temperature is "1"; expected a valid number.', "temperature"),
    "top_p": ({"top_p": 0}, "top_p is 0.0; allowed: above 0, up to 1", "top_p"),
    "top_k": ({"top_k": 0}, "top_k is 0; allowed: 1 or more, or absent for all tokens", "top_k"),
    "seed": ({"seed": -1}, "seed is -1; allowed: 0 to 18446744073709551615", "seed"),
    "n": ({"n": 0}, "n is 0; allowed: 1 to 128", "n"),
    "n true": ({"n": True}, "n is true; expected a valid integer.", "n"),
    "n of more than all places": ({"n": 25}, "n asks for 25 answers at once; allowed: up to 24 (8 run and 16", "n"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more", "max_tokens"),
    "both limits": (
        {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens and max_completion_tokens say", "max_tokens",
    ),
    "stop": ({"stop": ["x"] * 17}, "stop has 17 entries; allowed: at most 16", "stop"),
    "empty stop": ({"stop": ""}, "stop_strings has a string of 0 characters; allowed: 1 to 1024", "stop"),
    "presence": ({"presence_penalty": 3}, "presence_penalty is 3.0; allowed: -2 to 2", "presence_penalty"),
    "frequency": ({"frequency_penalty": -3}, "frequency_penalty is -3.0; allowed: -2 to 2", "frequency_penalty"),
    "bias": ({"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101.0; allowed: -100 to 100", "logit_bias"),
    "bias of a word": ({"logit_bias": {"the": 1}}, "logit_bias has the key 'the'; allowed: token ids", "logit_bias"),
    "bias of no token": ({"logit_bias": {"99999": 1}}, "logit_bias has 99999; allowed: 0 to", "logit_bias"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs is set; allowed only with logprobs true", "top_logprobs"),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; allowed: 0 to 20", "top_logprobs"),
    "stream options": (
        {"stream_options": {"include_usage": True}},
        "stream_options is set; allowed only with stream true",
        "stream_options",
    ),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none"}}}},
        "response_format cannot be enforced: ",
        "response_format",
    ),
    "no messages": ({"messages": []}, "messages has 0 entries; allowed: 1 to 4096", "messages"),
    "many messages": ({"messages": [{}] * 4097}, "messages has 4097 entries; allowed: 1 to 4096", "messages"),
    "role": ({"messages": [{"role": "robot"}]}, 'messages[0].role is "robot"; expected', "messages[0].role"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "content has a part of type 'image_url'; allowed: text",
        "messages[0].content",
    ),
    "call of a user": (
        {"messages": [{"role": "user", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
        "messages has tool_calls in a message of role 'user'; allowed: 'assistant'",
        "messages",
    ),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "["}}]}]},
        "arguments is not a JSON object, written as a string",
        "messages[0].tool_calls[0].function.arguments",
    ),
    "choice without tools": ({"tool_choice": "required"}, "tool_choice is set, but tools is empty", "tool_choice"),
    "choice of no tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice is 'g'; allowed: clock",
        "tool_choice",
    ),
    "tool twice": ({"tools": [TOOL, TOOL]}, "tools has a name twice: clock, clock", "tools"),
    "other tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type is", "tools[0].type"),
    "tools and format": (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        "response_format is set together with tools",
        "response_format",
    ),
    "long prompt": ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt has 6", "messages"),
}  # fmt: skip
BAD_TEXTS: dict[str, tuple[dict[str, object], str, str | None]] = {
    "suffix": ({"suffix": "y"}, "suffix is not supported.", "suffix"),
    "best_of": ({"best_of": 3}, "best_of is 3; allowed: the value of n, 1", "best_of"),
    "many logprobs": ({"logprobs": 21}, "logprobs is 21; allowed: 0 to 20", "logprobs"),
    "echoed logprobs": ({"echo": True, "logprobs": 1}, "echo is true; allowed with logprobs: false", "echo"),
    "number": ({"prompt": 5}, "prompt is not a text, a list of texts", "prompt"),
    "mixture": ({"prompt": ["x", [1]]}, "prompt has entries that are neither", "prompt"),
    "no token": ({"prompt": [99999]}, "prompt.token_ids has 99999; allowed: 0 to", "prompt"),
    "nothing": ({"prompt": ""}, "prompt is empty; ", "prompt"),
}


def error_of(response: httpx2.Response, status: int = 400) -> dict[str, str]:
    """All of it but what is null."""
    assert response.status_code == status, response.text
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {name: value for name, value in error.items() if value is not None}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_chat_that_cannot_be_answered_is_refused_by_name(live: HttpNode, name: str) -> None:
    fields, sentence, param = BAD_CHATS[name]
    error = error_of(live.post("/v1/chat/completions", CHAT | fields))
    assert error["message"].startswith(sentence)
    assert error.get("param") == param
    assert error["type"] == "invalid_request_error"


HALF_A_CHARACTER = "\ud800"


@pytest.mark.parametrize(
    ("fields", "sentence", "param"),
    [
        ({"model": HALF_A_CHARACTER}, 'The model "\\ud800" does not exist here', "model"),
        ({"messages": [{"role": HALF_A_CHARACTER}]}, 'messages[0].role is "\\ud800"; expected', "messages[0].role"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["\ud800"]}}}},
            "response_format cannot be enforced: ",
            "response_format",
        ),
    ],
)
def test_half_a_character_is_refused_where_it_is(
    live: HttpNode, fields: dict[str, object], sentence: str, param: str
) -> None:
    content, headers = json.dumps(CHAT | fields), {"content-type": "application/json"}
    response = httpx2.post(f"{live.url}/v1/chat/completions", content=content, headers=headers, timeout=TIMEOUT_S)
    error = error_of(response, 404 if param == "model" else 400)
    assert error["message"].startswith(sentence)
    assert error["param"] == param


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_continued_is_refused_by_name(live: HttpNode, name: str) -> None:
    fields, sentence, param = BAD_TEXTS[name]
    error = error_of(live.post("/v1/completions", TEXT | fields))
    assert error["message"].startswith(sentence)
    assert error.get("param") == param


def test_null_is_the_same_as_absent(live: HttpNode) -> None:
    nulls = dict.fromkeys(("stop", "seed", "logit_bias", "tools", "audio", "stream_options", "user", "n"))
    assert live.post("/v1/chat/completions", CHAT | {"max_tokens": 1} | nulls).status_code == 200
    assert error_of(live.post("/v1/chat/completions", {"model": MODEL}))["message"] == "messages is missing."


def test_what_asks_for_nothing_is_accepted(live: HttpNode) -> None:
    harmless = {
        "user": "me", "safety_identifier": "me", "store": False, "service_tier": "auto", "modalities": ["text"],
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "tool_choice": "none", "tools": [TOOL],
    }  # fmt: skip
    assert live.post("/v1/chat/completions", CHAT | {"max_tokens": 1} | harmless).status_code == 200


def test_bodies_that_are_no_requests(live: HttpNode) -> None:
    url = f"{live.url}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    assert "is not JSON" in error_of(httpx2.post(url, content=b"{", headers=json_type))["message"]
    assert "not a JSON object" in error_of(httpx2.post(url, content=b"[1]", headers=json_type))["message"]
    # What a browser sends to anybody without asking.
    plain = httpx2.post(url, content=b"{}", headers={"content-type": "text/plain"})
    assert "content-type is not application/json" in error_of(plain)["message"]


def test_a_body_beyond_the_limit_is_refused_whether_it_says_its_length_or_not(live: HttpNode) -> None:
    url = f"{live.url}/v1/chat/completions"
    known = httpx2.post(url, content=b"x" * 100_001)
    unknown = httpx2.post(url, content=(b"x" * 10_000 for _ in range(11)))
    for response in (known, unknown):
        assert "allowed: at most 100000 bytes" in error_of(response, 413)["message"]


def test_other_models_and_endpoints_are_not_found(live: HttpNode) -> None:
    with live.client() as client, pytest.raises(openai.NotFoundError, match="served: tiny") as refused:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "model_not_found"
    assert error_of(live.get("/v1/files"), 404)["message"] == "GET /v1/files: Not Found."
    assert error_of(live.get("/v1/completions"), 405)["type"] == "invalid_request_error"
    embeddings = error_of(live.post("/v1/embeddings", {"model": MODEL, "input": "x"}))
    assert "makes no embeddings" in embeddings["message"]


def test_tools_need_a_template_that_has_them(tmp_path: Path) -> None:
    with http_node(HeldEngine(), load_tokenizer(tmp_path)) as node:
        error = error_of(node.post("/v1/chat/completions", CHAT | {"tools": [TOOL]}))
    assert error["message"].startswith("tools is set, but this model's chat template has no place for tools")
    assert error["param"] == "tools"


def test_tokenize_takes_one_of_two(live: HttpNode) -> None:
    both = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    for body in ({}, both):
        assert "and not both" in error_of(live.post("/tokenize", body))["message"]
    assert error_of(live.post("/detokenize", {"tokens": [99999]}))["message"].startswith("token_ids has 99999")
    assert error_of(live.post("/tokenize", {"model": "other", "prompt": "x"}), 404)["param"] == "model"


def test_overload_and_shutdown_say_when_to_come_again(tmp_path: Path) -> None:
    engine = HeldEngine()
    body = CHAT | {"stream": True}
    with (
        http_node(engine, load_tokenizer(tmp_path), AdmissionLimits(1, 0, 60.0)) as node,
        httpx2.stream("POST", f"{node.url}/v1/chat/completions", json=body, timeout=60),
    ):
        running = engine.submitted.get(timeout=60)
        full = node.post("/v1/chat/completions", CHAT)
        assert error_of(full, 429)["type"] == "rate_limit_error"
        assert int(full.headers["retry-after"]) >= 1
        assert int(full.headers["retry-after-ms"]) >= 100
        node.on_loop(lambda behind: behind.admission.refuse("This compute node is shutting down."))
        gone = node.post("/v1/chat/completions", CHAT)
        assert "shutting down" in error_of(gone, 503)["message"]
        assert gone.headers["retry-after"] == "1"
        assert error_of(node.get("/ready"), 503)["message"] == "This compute node is shutting down."
        assert node.get("/health").status_code == 200
        engine.end(running)
