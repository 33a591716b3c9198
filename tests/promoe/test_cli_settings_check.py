"""Settings that cannot be are refused by the services themselves, before anything takes long."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe.cli import settings_check
from promoe.cli.settings_check import check_all_settings
from promoe.cli.stop_signals import StopSignals
from promoe.cli.supervisor import ServiceCommand
from promoe.errors import DeadlineExceeded, InternalError
from tests.promoe.command_line import CommandLine


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    with StopSignals() as stop:
        yield stop


def command_of(module: str, *arguments: str) -> ServiceCommand:
    return ServiceCommand("node", "none", arguments, Path("/nowhere"), 1.0, settings_module=module)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--cache-rate", "2"), "compute.cache_rate is 2.0; allowed: above 0, up to 1"),
        (("--set", "compute.policy=best"), "compute.policy is 'best'; "),
        (("--set", "store.foo=1"), "store.foo is not a setting; known in [store]: "),
        (("--predictor", "nobody"), "predictor.predictor is 'nobody'; installed: auto, "),
        (("--http", "0.0.0.0:0"), "which others can reach: give keys with compute.http_api_keys_file"),
    ],
)
def test_up_refuses_settings_before_anything_is_packed(
    socket_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.delenv("PROMOE_API_KEYS", raising=False)
    ran = CommandLine(socket_dir, monkeypatch, capsys).run("up", "--listen", "127.0.0.1:0", *flags)
    assert ran.code == 2
    assert sentence in ran.err
    assert not list(socket_dir.glob("home/packs/*")), "nothing was made"
    assert not list(socket_dir.glob("run/*.log")), "nothing was started"


def test_a_check_that_breaks_is_no_wrong_setting(stop: StopSignals) -> None:
    with pytest.raises(InternalError, match=r"(?s)no_such_module ended with status 1:.*No module named"):
        check_all_settings([command_of("no_such_module")], stop)


def test_a_check_that_hangs_ends_with_a_deadline_or_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: StopSignals
) -> None:
    keys = tmp_path / "keys"
    os.mkfifo(keys)  # nobody ever writes into it
    needs = ("compute.pack=/p", "compute.store_endpoint=unix:/s", f"compute.http_api_keys_file={keys}")
    settings = (*needs, "compute.http_listen=127.0.0.1:0")
    hanging = command_of("compute_node.settings", *(word for text in settings for word in ("--set", text)))
    monkeypatch.setattr(settings_check, "_DEADLINE_S", 0.5)
    with pytest.raises(DeadlineExceeded, match=r"compute_node\.settings has not looked at its settings"):
        check_all_settings([hanging], stop)
    os.kill(os.getpid(), signal.SIGINT)
    assert not check_all_settings([hanging], stop)
