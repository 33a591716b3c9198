"""Clients that leave, answers that fail, proxies that wait: over an engine whose every step is the test's own."""

import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from transformers import PreTrainedTokenizerBase

from compute_node.admission import AdmissionLimits
from compute_node.http import completion_reply
from promoe.errors import InternalError, Unavailable
from tests.compute_node.tiny_serving import load_tokenizer
from tests.http_node import MODEL, TIMEOUT_S, HeldEngine, HttpNode, http_node

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
LIMITS = AdmissionLimits(max_concurrent_requests=2, max_queued_requests=2, request_deadline_s=60.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture
def node(engine: HeldEngine, tokenizer: PreTrainedTokenizerBase) -> Iterator[HttpNode]:
    with http_node(engine, tokenizer, LIMITS) as running:
        yield running


def lines_of(response: httpx2.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line)


def test_a_client_that_leaves_a_stream_is_noticed_without_a_further_token(node: HttpNode, engine: HeldEngine) -> None:
    with httpx2.stream("POST", f"{node.url}/v1/chat/completions", json=BODY, timeout=TIMEOUT_S) as response:
        request_id = engine.submitted.get(timeout=TIMEOUT_S)
        engine.draw(request_id, 70)
        lines = lines_of(response)
        assert "assistant" in next(lines)
        assert "content" in next(lines)
    assert engine.cancelled.get(timeout=TIMEOUT_S) == request_id
    assert engine.num_drawn == 1


def test_a_client_that_leaves_before_its_answer_is_noticed(node: HttpNode, engine: HeldEngine) -> None:
    """The whole answer at once: nothing would be sent for minutes. All of its answers end, those that wait too."""
    host, port = node.url.removeprefix("http://").split(":")
    text = '{"model": "tiny", "prompt": "x", "n": 4}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{head}\r\n\r\n{text}".encode())
        running = {engine.submitted.get(timeout=TIMEOUT_S) for _ in range(2)}
        assert node.on_loop(lambda behind: behind.admission.num_queued) == 2
    assert {engine.cancelled.get(timeout=TIMEOUT_S) for _ in range(2)} == running
    # A waiting one may have got the place of a cancelled one; then it is cancelled there.
    while node.on_loop(lambda behind: behind.admission.num_running + behind.admission.num_queued):
        try:
            engine.cancelled.get(timeout=0.05)
        except queue.Empty:
            continue


def test_a_client_that_leaves_while_its_prompt_is_encoded_is_noticed(node: HttpNode, engine: HeldEngine) -> None:
    host, port = node.url.removeprefix("http://").split(":")
    text = f'{{"model": "tiny", "prompt": "{"x " * 200}", "stream": true}}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{head}\r\n\r\n{text}".encode())
    # Whether it was gone before or after: what was submitted is cancelled.
    submitted = engine.submitted.get(timeout=TIMEOUT_S)
    assert engine.cancelled.get(timeout=TIMEOUT_S) == submitted


def test_an_answer_that_fails_in_the_middle_says_so_in_the_stream(node: HttpNode, engine: HeldEngine) -> None:
    with httpx2.stream("POST", f"{node.url}/v1/chat/completions", json=BODY, timeout=TIMEOUT_S) as response:
        request_id = engine.submitted.get(timeout=TIMEOUT_S)
        engine.draw(request_id, 70)
        engine.fail(request_id, Unavailable("An expert cannot be had."))
        *_, last = lines_of(response)
    assert '"message":"An expert cannot be had."' in last
    assert '"type":"server_error"' in last


def test_an_answer_that_fails_before_it_begins_has_a_status(node: HttpNode, engine: HeldEngine) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.post, "/v1/chat/completions", BODY | {"stream": False})
        engine.fail(engine.submitted.get(timeout=TIMEOUT_S), InternalError("It broke."))
        response = answer.result(TIMEOUT_S)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "It broke."


def test_a_silent_stream_is_kept_alive(node: HttpNode, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion_reply, "KEEPALIVE_S", 0.01)
    with httpx2.stream("POST", f"{node.url}/v1/chat/completions", json=BODY, timeout=TIMEOUT_S) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        request_id = engine.submitted.get(timeout=TIMEOUT_S)
        lines = lines_of(response)
        assert "assistant" in next(lines)
        assert next(lines) == ": keepalive"
        engine.draw(request_id, 70)
        engine.end(request_id)
        rest = [line for line in lines if line != ": keepalive"]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]


def test_the_other_answers_end_with_the_one_that_failed(node: HttpNode, engine: HeldEngine) -> None:
    with httpx2.stream("POST", f"{node.url}/v1/chat/completions", json=BODY | {"n": 2}, timeout=TIMEOUT_S) as response:
        first, second = (engine.submitted.get(timeout=TIMEOUT_S) for _ in range(2))
        engine.fail(first, Unavailable("An expert cannot be had."))
        *_, last = lines_of(response)
    assert "An expert cannot be had." in last
    assert engine.cancelled.get(timeout=TIMEOUT_S) == second


@pytest.mark.parametrize("num_answers", [1, 2])
def test_an_answer_that_somebody_else_ended_is_no_whole_one(
    node: HttpNode, engine: HeldEngine, num_answers: int
) -> None:
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(node.post, "/v1/chat/completions", BODY | {"n": num_answers, "stream": False})
        first, *others = (engine.submitted.get(timeout=TIMEOUT_S) for _ in range(num_answers))
        engine.draw(first, 70)
        assert node.on_loop(lambda behind: behind.parts.admission.cancel_id(first))
        response = asked.result(TIMEOUT_S)
    assert response.status_code == 499, "a status that clients do not try again at"
    error = response.json()["error"]
    assert (error["code"], first in error["message"]) == ("cancelled", True)
    assert [engine.cancelled.get(timeout=TIMEOUT_S) for _ in range(num_answers)] == [first, *others]
