"""What a store can be asked for, and what it refuses with the allowed set."""

import os
from pathlib import Path

import pytest

from expert_store.config import StoreConfig, default_run_dir
from promoe.config import Settings

PACK = Path("/packs/demo")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("fill_threads=0", "store.fill_threads is 0; allowed: 1 to 256"),
        ("fill_threads=257", "allowed: 1 to 256"),
        ("adopt_wait_s=-1", "store.adopt_wait_s is -1.0; allowed: 0 or more"),
        ("adopt_wait_s=nan", "store.adopt_wait_s is nan; allowed: 0 or more"),
        ("scrub_interval_s=-0.5", "store.scrub_interval_s"),
        ("drain_deadline_s=-2", "store.drain_deadline_s"),
        ("allowed_uids=root", "store.allowed_uids is 'root'; expected numbers"),
        ("run_dir=/" + "x" * 120, "longer than 107 bytes; set store.run_dir shorter"),
        ("listen=unix:/" + "x" * 120, "longer than 107 bytes"),
        ("nonsense=1", "store.nonsense is not a setting; known in"),
    ],
)
def test_refuses_with_a_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(None, [f"store.pack={PACK}", f"store.{setting}"]).section("store", StoreConfig)


def test_sockets_lie_in_the_run_folder_unless_told_otherwise() -> None:
    config = StoreConfig(PACK, run_dir=Path("/run/promoe"))
    assert config.endpoint == "unix:/run/promoe/store.sock"
    assert config.listen_socket == Path("/run/promoe/store.sock")
    assert config.fd_socket == Path("/run/promoe/arena.sock")
    remote = StoreConfig(PACK, run_dir=Path("/run/promoe"), listen="0.0.0.0:7000")
    assert remote.endpoint == "0.0.0.0:7000"
    assert remote.listen_socket is None


def test_the_default_run_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_run_dir() == Path("/run/user/7/promoe")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir() == Path(f"/tmp/promoe-{os.getuid()}")


def test_root_and_the_stores_own_user_may_always_attach() -> None:
    assert StoreConfig(PACK).peer_uids == {0, os.geteuid()}
    assert StoreConfig(PACK, allowed_uids="12, 34").peer_uids == {0, os.geteuid(), 12, 34}
