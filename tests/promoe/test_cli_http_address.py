"""Where `promoe up` has its HTTP API: as asked, by default, or beside what is taken."""

import socket
from collections.abc import Iterator

import pytest

from promoe.cli import http_address
from promoe.cli.http_address import HttpAddress, plan_http
from promoe.errors import AlreadyRunning, InvalidInput


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A port that somebody listens on, in the place of the default one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(http_address, "DEFAULT_HTTP_LISTEN", address)
        yield address


def test_a_taken_default_is_passed_by_and_said(taken: str) -> None:
    planned = plan_http(None)
    assert planned.is_fallback
    assert planned.listen.startswith("127.0.0.1:")
    assert planned.listen != taken
    assert planned.sentence() == (
        f"OpenAI-compatible API: {planned.url} · its page: http://{planned.listen}/ "
        f"({taken} is taken; --http gives another address)"
    )


def test_a_free_default_is_taken(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = plan_http("127.0.0.1:0").listen
    monkeypatch.setattr(http_address, "DEFAULT_HTTP_LISTEN", free)
    assert plan_http(None) == HttpAddress(free)
    assert plan_http(None).sentence() == f"OpenAI-compatible API: http://{free}/v1 · its page: http://{free}/"


def test_an_address_that_was_asked_for_is_that_or_none(taken: str) -> None:
    with pytest.raises(AlreadyRunning, match=f"{taken} cannot be listened on .*; give another --http"):
        plan_http(taken)
    for wrong in ("unix:/x", "8080"):
        with pytest.raises(InvalidInput, match="is not an address"):
            plan_http(wrong)


@pytest.mark.parametrize("asked", ["", "none"])
def test_none_is_none(asked: str) -> None:
    assert plan_http(asked) == HttpAddress("")
    assert plan_http(asked).url == ""
    assert plan_http(asked).sentence() == "There is no HTTP API, as asked."


def test_every_interface_is_reached_over_the_loopback_one() -> None:
    assert HttpAddress("0.0.0.0:8080").url == "http://127.0.0.1:8080/v1"
