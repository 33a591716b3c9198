"""What a predictor service can be asked for, and what it refuses with the allowed set."""

import os
from pathlib import Path

import pytest

from predictor_service.config import AUTO, PredictorConfig, default_listen
from promoe.config import Settings

PACK = Path("/packs/demo")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("max_rows=0", "predictor.max_rows is 0; allowed: 1 to 4096"),
        ("max_rows=9999", "allowed: 1 to 4096"),
        ("max_sessions=0", "predictor.max_sessions is 0; allowed: 1 to 256"),
        ("max_queued_events=0", "predictor.max_queued_events is 0"),
        ("lookahead=0", "predictor.lookahead is 0; allowed: 1 to 16"),
        ("lookahead=two", "predictor.lookahead is 'two'; expected int"),
        ("drain_deadline_s=-1", "predictor.drain_deadline_s is -1.0; allowed: 0 or more"),
        ("drain_deadline_s=inf", "predictor.drain_deadline_s is inf"),
        ("metrics_listen=9100", "predictor.metrics_listen is '9100'; expected host:port"),
        ("metrics_listen=localhost:99999", "expected host:port"),
        ("nonsense=1", "predictor.nonsense is not a setting; known in"),
    ],
)
def test_refuses_with_a_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(None, [f"predictor.pack={PACK}", f"predictor.{setting}"]).section("predictor", PredictorConfig)


def test_only_the_pack_is_required() -> None:
    config = Settings(None, [f"predictor.pack={PACK}"]).section("predictor", PredictorConfig)
    assert (config.pack, config.predictor, config.artifact, config.lookahead) == (PACK, AUTO, None, None)
    with pytest.raises(ValueError, match=r"predictor\.pack is missing"):
        Settings().section("predictor", PredictorConfig)


def test_everything_can_be_set() -> None:
    texts = ["pack=/p", "predictor=oracle", "artifact=/t.trace", "lookahead=3", "metrics_listen=localhost:0"]
    config = Settings(None, [f"predictor.{text}" for text in texts]).section("predictor", PredictorConfig)
    assert (config.predictor, config.artifact, config.lookahead) == ("oracle", Path("/t.trace"), 3)


def test_the_default_socket_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_listen() == "unix:/run/user/7/promoe/predictor.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_listen() == f"unix:/tmp/promoe-{os.getuid()}/predictor.sock"
