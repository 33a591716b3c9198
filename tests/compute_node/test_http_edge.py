"""The edge, as plain ASGI: what an application behind it sees, and what never reaches it."""

import asyncio
import json
from collections.abc import Iterable

import pytest
from starlette.types import Message, Receive, Scope, Send

from compute_node.http import edge
from compute_node.http.api_keys import ApiKeys
from compute_node.http.edge import Edge, EdgeRules

RULES = EdgeRules(ApiKeys(), frozenset({"/health"}), max_body_nbytes=10)


class Application:
    """Answers with the body that it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.next_message: Message = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        self.bodies.append(message["body"])
        self.next_message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})


def ask(
    messages: Iterable[Message], *headers: tuple[bytes, bytes], rules: EdgeRules = RULES
) -> tuple[Application, list[Message]]:
    """One request in pieces; `receive` blocks for ever when they are used up."""
    application = Application()
    sent: list[Message] = []
    waiting = iter(messages)

    async def receive() -> Message:
        for message in waiting:
            return message
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": list(headers)}
    asyncio.run(asyncio.wait_for(Edge(application, rules)(scope, receive, send), 30))
    return application, sent


def piece(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


GONE: Message = {"type": "http.disconnect"}


def test_a_body_in_pieces_comes_whole_and_then_what_follows() -> None:
    application, sent = ask([piece(b"ab", True), piece(b"", True), piece(b"cd", False), GONE])
    assert application.bodies == [b"abcd"]
    assert application.next_message == GONE
    assert sent[0]["status"] == 200
    assert any(name == b"x-request-id" for name, _ in sent[0]["headers"])


def test_a_long_body_is_given_up_when_it_is_too_long() -> None:
    application, sent = ask([piece(b"x" * 6, True), piece(b"x" * 6, True)])
    assert application.bodies == []
    assert sent[0]["status"] == 413
    assert "at most 10 bytes" in json.loads(sent[1]["body"])["error"]["message"]
    assert ask([], (b"content-length", b"11"))[1][0]["status"] == 413


def test_a_client_that_leaves_before_it_has_asked_is_not_answered() -> None:
    application, sent = ask([piece(b"ab", True), GONE])
    assert application.bodies == []
    assert sent == []


def test_a_client_that_does_not_go_on_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "BODY_DEADLINE_S", 0.01)
    application, sent = ask([piece(b"ab", True)])
    assert application.bodies == []
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1:8080", 200), (b"localhost:8080", 200), (b"localhost", 200), (b"[::1]:8080", 200),
        (b"evil.example:8080", 403), (b"127.0.0.1.evil.example", 403), (b"", 403),
    ],
)  # fmt: skip
def test_without_keys_only_this_hosts_own_names_are_answered_to(host: bytes, status: int) -> None:
    rules = EdgeRules(ApiKeys(), frozenset(), 10, is_private=True)
    _, sent = ask([piece(b"", False), GONE], (b"host", host), rules=rules)
    assert sent[0]["status"] == status
    assert ask([piece(b"", False), GONE], (b"host", host))[1][0]["status"] == 200


def test_other_protocols_pass() -> None:
    reached = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("not asked")

    async def send(message: Message) -> None:
        raise AssertionError("not answered")

    asyncio.run(Edge(application, RULES)({"type": "lifespan"}, receive, send))
    assert reached == ["lifespan"]
