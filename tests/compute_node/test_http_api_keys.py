"""Keys: where they come from, what is accepted, and what is never let through."""

import logging
from pathlib import Path

import pytest

from compute_node.http.api_keys import ApiKeys, read_api_keys
from promoe.config import SettingUnfit


def test_without_keys_everybody_is_let_in() -> None:
    keys = read_api_keys(None, None)
    assert not keys.are_needed
    assert keys.accept(None)
    assert not read_api_keys(None, " , ").are_needed


def test_keys_come_from_file_and_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("# team a\nkey-of-team-a\n\n  key-of-team-b  \n")
    file.chmod(0o600)
    keys = read_api_keys(file, "key-of-ops-1, key-of-ops-2")
    assert caplog.text == ""
    for key in ("key-of-team-a", "key-of-team-b", "key-of-ops-1", "key-of-ops-2"):
        assert keys.accept(f"Bearer {key}")
        assert keys.accept(f"bearer  {key} ")
    for authorization in (None, "", "Bearer ", "Bearer # team a", "Bearer key-of-team-a2", "Basic key-of-team-a"):
        assert not keys.accept(authorization)


def test_a_file_that_others_can_read_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("key-of-team-a")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert read_api_keys(file, None).are_needed
    assert "can be read by others; chmod 600" in caplog.text
    assert "key-of-team-a" not in caplog.text


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_file_without_keys_is_a_mistake(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(SettingUnfit, match="which has no key; expected one a line"):
        read_api_keys(file, None)


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingUnfit, match=r"http_api_keys_file is .*which cannot be read"):
        read_api_keys(tmp_path / "none", None)


@pytest.mark.parametrize("key", ["short", "with a space", "schl\u00fcssel-lang"])
def test_keys_that_are_none_are_refused_without_being_shown(key: str) -> None:
    with pytest.raises(SettingUnfit, match="allowed: 8 or more of ASCII") as refused:
        ApiKeys([key])
    assert key not in str(refused.value)
