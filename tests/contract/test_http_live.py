"""`/api/live` and `/api/requests`: what those who watch a node are told, and how they end a request."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import httpx2
import pytest
from transformers import PreTrainedTokenizerBase

from promoe.request_id import answered_request_id
from tests.compute_node.tiny_serving import FixedReport
from tests.http_node import MODEL, TIMEOUT_S, HeldEngine, HttpNode, http_node
from tests.log_lines import json_log

Look = dict[str, object]
SECRET = "what nobody else may read"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "stream": True, "max_tokens": 9}


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
def node(engine: HeldEngine, tool_tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(engine, tool_tokenizer, cors_origins=("https://other.example",)) as running:
        yield running


@contextmanager
def looks(node: HttpNode) -> Iterator[Iterator[Look]]:
    """The live stream's looks as they come."""
    with httpx2.stream("GET", f"{node.url}/api/live", timeout=TIMEOUT_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        yield (cast("Look", json.loads(text)) for text in data)


@contextmanager
def asked(node: HttpNode, engine: HeldEngine, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A request that the engine has, and the lines of its answer, complete when the block has ended."""
    lines: list[str] = []

    def read() -> None:
        url = f"{node.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json=BODY, headers=headers, timeout=TIMEOUT_S) as response:
            lines.extend(response.iter_lines())

    thread = threading.Thread(target=read)
    thread.start()
    yield engine.submitted.get(timeout=TIMEOUT_S), lines
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the answer ends"


def requests_of(look: Look) -> list[Look]:
    return cast("list[Look]", look["requests"])


def until_requests(stream: Iterator[Look], number: int) -> list[Look]:
    return requests_of(next(look for look in stream if len(requests_of(look)) == number))


def test_a_look_has_what_the_node_reports(node: HttpNode) -> None:
    with looks(node) as stream:
        look = next(stream)
    report = FixedReport()
    assert look["node"]["model"] == MODEL  # type: ignore[index]
    assert look["phases"]["decode"]["hits"] == report.stats.decode.hits  # type: ignore[index]
    assert look["predictor"] == {
        "endpoint": report.predictor.endpoint, "state": "connected", "version": "learned@7",
    }  # fmt: skip
    shown = cast("Look", look["map"])
    assert base64.b64decode(str(shown["states"])) == report.map.experts
    assert (shown["layers"], shown["experts"], shown["step"]) == (3, 8, 5)
    assert look["hints"]["qualities"] == [  # type: ignore[index]
        {"version": "learned@7", "lookahead": 2, "hinted": 10, "correct": 8, "ready": 6}
    ]
    nbytes = cast("dict[str, float]", look["bytes"])
    assert nbytes["demand"] == 5 + 11
    assert nbytes["prefetch"] == 0, "never less than nothing, whichever counter is ahead"


def test_requests_are_listed_without_their_texts_and_can_be_cancelled(node: HttpNode, engine: HeldEngine) -> None:
    with looks(node) as stream, asked(node, engine) as (request_id, lines):
        engine.draw(request_id, 5, 6)
        found = next(look for look in stream if requests_of(look) and requests_of(look)[0]["output_tokens"] == 2)
        (request,) = requests_of(found)
        assert (request["id"], request["state"], request["max_output_tokens"]) == (request_id, "running", 9)
        assert SECRET not in json.dumps(found)
        cancelled = node.post(f"/api/requests/{request_id}/cancel", {})
        assert cancelled.json() == {"id": request_id, "state": "cancelled"}
        assert engine.cancelled.get(timeout=TIMEOUT_S) == request_id
        assert until_requests(stream, 0) == []
    *_, last = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert last["error"]["code"] == "cancelled", "half an answer does not look like a whole one"
    gone = node.post(f"/api/requests/{request_id}/cancel", {})
    assert gone.status_code == 404
    assert request_id in gone.json()["error"]["message"]


def test_all_who_watch_are_given_the_same_look(node: HttpNode) -> None:
    with looks(node) as first, looks(node) as second:
        next(first)
        assert {next(first)["at_s"] for _ in range(2)} & {next(second)["at_s"] for _ in range(3)}


def test_log_lines_say_which_request_they_are_about(node: HttpNode, engine: HeldEngine) -> None:
    with json_log("compute_node") as lines, asked(node, engine, traceparent="00-0a-0b-01") as (answer_id, _):
        engine.draw(answer_id, 5)
        engine.end(answer_id)
        told = [lines.next() for _ in range(2)]
    assert [record.traceparent for record in node.on_loop(lambda serving: serving.answers)] == ["00-0a-0b-01"]
    answer, edge = told
    assert (answer["answer_id"], answer["outcome"], answer["output_tokens"]) == (answer_id, "finished", 1)
    assert (edge["path"], edge["status"]) == ("/v1/chat/completions", 200)
    assert answer["request_id"] == edge["request_id"] == answered_request_id(answer_id) != ""
    assert SECRET not in json.dumps(told)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1"}, 403),
        ({"sec-fetch-site": "same-origin"}, 404),
        ({"sec-fetch-site": "same-origin", "origin": "https://name-of-a-proxy.example"}, 404),
        ({"sec-fetch-site": "cross-site", "origin": "https://other.example"}, 404),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_other_pages_change_nothing(node: HttpNode, headers: dict[str, str], status: int) -> None:
    response = node.post("/api/requests/none/cancel", {}, **headers)
    assert response.status_code == status, response.text


def test_the_own_origin_is_known_without_the_newer_headers(node: HttpNode) -> None:
    assert node.post("/api/requests/none/cancel", {}, origin=node.url).status_code == 404
