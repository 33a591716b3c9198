"""The page at `/`: what is served, to whom, and what it may do in a browser."""

import re
from collections.abc import Iterator

import httpx2
import pytest
from transformers import PreTrainedTokenizerBase

from compute_node.http.page_routes import read_page
from tests.http_node import HttpNode, ScriptEngine, http_node

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def guarded(tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(ScriptEngine(tool_tokenizer, "hello"), tool_tokenizer, keys=(KEY,)) as node:
        yield node


def test_the_page_needs_no_key_and_what_it_asks_for_does(guarded: HttpNode) -> None:
    with httpx2.Client(base_url=guarded.url) as browser:
        for path in ("/", *(f"/page/{name}" for name in read_page())):
            assert browser.get(path).status_code == 200, path
    assert guarded.get("/api/live").status_code == 401
    assert guarded.get("/api/predictor").status_code == 401
    assert guarded.post("/api/predictor/rollback", {}).status_code == 401
    assert guarded.post("/api/requests/x/cancel", {}).status_code == 401


def test_every_part_of_the_page_says_what_it_is(guarded: HttpNode) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    with httpx2.Client(base_url=guarded.url) as browser:
        for name in read_page():
            media_type = browser.get(f"/page/{name}").headers["content-type"]
            assert media_type.startswith(kinds[name.rpartition(".")[2]]), name


def test_the_policy_lets_the_page_reach_nothing_but_its_node(guarded: HttpNode) -> None:
    headers = guarded.get("/").headers
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'", "no text becomes markup"
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_host_and_has_no_script_of_its_own() -> None:
    for name, file in read_page().items():
        text = file.content.decode()
        hosts = set(re.findall(r"(?:https?:)?//([a-z0-9.-]+\.[a-z]{2,})", text)) - {"www.w3.org"}
        assert hosts == set(), name
        assert "innerHTML" not in text, name
    index = read_page()["index.html"].content.decode()
    assert re.findall(r"<script(?![^>]*\ssrc=)", index) == []
    assert re.findall(r"\s(?:style|on[a-z]+)=", index) == []


def test_what_the_browser_has_already_is_not_sent_again(guarded: HttpNode) -> None:
    first = guarded.get("/page/main.js")
    again = guarded.get("/page/main.js", **{"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert guarded.get("/page/main.js", **{"if-none-match": '"other"'}).content == first.content


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/..%2fapp.py", "/page/__init__.py"])
def test_there_is_nothing_else(guarded: HttpNode, path: str) -> None:
    response = httpx2.get(f"{guarded.url}{path}", headers={"authorization": f"Bearer {KEY}"})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"
