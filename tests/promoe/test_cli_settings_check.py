"""Settings that cannot be are refused by the services themselves, before anything takes long."""

from pathlib import Path

import pytest

from promoe.cli.settings_check import check_settings
from promoe.cli.supervisor import ServiceCommand
from promoe.errors import InternalError
from tests.promoe.command_line import CommandLine


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--cache-rate", "2"), "compute.cache_rate is 2.0; allowed: above 0, up to 1"),
        (("--set", "store.foo=1"), "store.foo is not a setting; known in [store]: "),
        (("--predictor", "nobody"), "predictor.predictor is 'nobody'; installed: auto, "),
        (("--http", "0.0.0.0:0"), "which others can reach: give keys with compute.http_api_keys_file"),
    ],
)
def test_up_refuses_settings_before_anything_is_packed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.delenv("PROMOE_API_KEYS", raising=False)
    ran = CommandLine(tmp_path, monkeypatch, capsys).run("up", "--listen", "127.0.0.1:0", *flags)
    assert ran.code == 2
    assert sentence in ran.err
    assert not list(tmp_path.glob("home/packs/*")), "nothing was made"
    assert not list(tmp_path.glob("run/*.log")), "nothing was started"


def test_a_check_that_breaks_is_no_wrong_setting(tmp_path: Path) -> None:
    command = ServiceCommand("node", "none", (), tmp_path / "log", 1.0, settings_module="no_such_module")
    with pytest.raises(InternalError, match=r"(?s)no_such_module ended with status 1:.*No module named"):
        check_settings([command])
