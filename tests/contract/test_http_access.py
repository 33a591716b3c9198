"""Who may use the HTTP API, from where, and what every response carries."""

from collections.abc import Iterator

import httpx2
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from tests.http_node import MODEL, HttpNode, ScriptEngine, http_node

KEYS = ("first-secret-key", "second-secret-key")
ORIGIN = "https://chat.example"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def guarded(tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(ScriptEngine(tool_tokenizer, "hello"), tool_tokenizer, keys=KEYS, cors_origins=(ORIGIN,)) as node:
        yield node


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded: HttpNode, key: str) -> None:
    with guarded.client(key) as client:
        answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert answer.choices[0].message.content == "hello"


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer wrong-secret-key", f"Basic {KEYS[0]}", KEYS[0]])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/embeddings", "/nothing"])
def test_nothing_else_does(guarded: HttpNode, authorization: str | None, path: str) -> None:
    response = guarded.post(path, BODY, **({"authorization": authorization} if authorization else {}))
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_real_client_knows_what_is_wrong(guarded: HttpNode) -> None:
    with guarded.client("wrong-secret-key") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_figures_need_a_key_and_health_does_not(guarded: HttpNode) -> None:
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/metrics", authorization=f"Bearer {KEYS[0]}").status_code == 200
    assert guarded.get("/health").status_code == guarded.get("/ready").status_code == 200


def test_pages_of_the_named_origin_may_use_it(guarded: HttpNode) -> None:
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    allowed = httpx2.options(f"{guarded.url}/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    answered = guarded.post("/v1/chat/completions", BODY, origin=ORIGIN, authorization=f"Bearer {KEYS[0]}")
    assert answered.headers["access-control-allow-origin"] == ORIGIN
    refused = guarded.post("/v1/chat/completions", BODY, origin=ORIGIN)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN, "else the page cannot know that its key is wrong"
    other = httpx2.options(f"{guarded.url}/v1/chat/completions", headers=asked | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_no_page_may_by_default(live: HttpNode) -> None:
    answered = live.post("/v1/chat/completions", BODY | {"max_tokens": 1}, origin=ORIGIN)
    assert answered.status_code == 200
    assert "access-control-allow-origin" not in answered.headers
    assert httpx2.options(f"{live.url}/v1/chat/completions", headers={"origin": ORIGIN}).status_code == 405


def test_every_response_has_an_id_and_keeps_the_callers(live: HttpNode) -> None:
    ids = {live.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert live.get("/health", **{"x-request-id": "job-17:a"}).headers["x-request-id"] == "job-17:a"
    unfit = live.get("/nothing", **{"x-request-id": "x" * 65})
    assert unfit.status_code == 404
    assert unfit.headers["x-request-id"] != "x" * 65
