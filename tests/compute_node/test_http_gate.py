"""The HTTP address: taken at once, refused with a sentence, open to others only on purpose."""

import socket
from pathlib import Path

import pytest

from compute_node.__main__ import open_gate
from compute_node.config import ComputeConfig
from compute_node.http.gate import HttpGate
from compute_node.http.loopback import is_loopback
from promoe.config import Settings, SettingUnfit
from promoe.errors import AlreadyRunning


def config(*settings: str) -> ComputeConfig:
    asked = ["compute.pack=/packs/x", "compute.store_endpoint=unix:/s", *settings]
    return Settings(None, asked).section("compute", ComputeConfig)


def test_there_is_none_unless_it_is_asked_for() -> None:
    assert open_gate(config()) is None
    gate = open_gate(config("compute.http_listen=127.0.0.1:0"))
    assert gate is not None
    gate.close()


def test_the_address_is_held_from_the_start() -> None:
    gate = HttpGate(config("compute.http_listen=127.0.0.1:0"))
    try:
        address = gate.url.removeprefix("http://")
        with pytest.raises(
            AlreadyRunning, match=rf"cannot listen on {address} \(Address already in use\).*http_listen"
        ):
            HttpGate(config(f"compute.http_listen={address}"))
    finally:
        gate.close()
    again = HttpGate(config(f"compute.http_listen={address}"))
    again.close()


def test_an_address_of_another_machine_is_none() -> None:
    with pytest.raises(AlreadyRunning, match=r"cannot listen on 192\.0\.2\.1:8080"):
        HttpGate(config("compute.http_listen=192.0.2.1:8080", "compute.http_anonymous=true"))


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "example.org:0"])
def test_others_are_not_let_in_without_a_key(listen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOE_API_KEYS", raising=False)
    with pytest.raises(SettingUnfit, match=r"which others can reach: give keys with compute\.http_api_keys_file"):
        HttpGate(config(f"compute.http_listen={listen}"))


def test_others_are_let_in_with_a_key_or_on_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOE_API_KEYS", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("key-of-team-a")
    keys.chmod(0o600)
    for setting in (f"compute.http_api_keys_file={keys}", "compute.http_anonymous=true"):
        HttpGate(config("compute.http_listen=0.0.0.0:0", setting)).close()
    monkeypatch.setenv("PROMOE_API_KEYS", "key-of-ops-1")
    HttpGate(config("compute.http_listen=0.0.0.0:0")).close()


@pytest.mark.parametrize(
    ("host", "is_ours_alone"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("LocalHost", True), ("localhost.", True),
        ("[::1]", True),
        ("0.0.0.0", False), ("[::]", False), ("192.168.1.4", False), ("example.org", False),
    ],
)  # fmt: skip
def test_loopback_is_told_from_the_world(host: str, is_ours_alone: bool) -> None:
    assert is_loopback(host) == is_ours_alone


@pytest.mark.parametrize("listen", ["8080", "127.0.0.1", "127.0.0.1:99999", "unix:/x"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(ValueError, match=r"compute\.http_listen is .*; expected host:port"):
        config(f"compute.http_listen={listen}")


def test_a_body_has_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="http_max_body_bytes is 0; allowed: above 0"):
        config("compute.http_max_body_bytes=0")


def test_a_listener_is_a_socket_that_queues() -> None:
    """Who comes before the model is loaded waits instead of being turned away."""
    gate = HttpGate(config("compute.http_listen=127.0.0.1:0"))
    host, port = gate.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10):
        pass
    gate.close()
