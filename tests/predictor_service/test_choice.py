"""Which predictor serves: by name, or the best that the pack allows; and which are installed at all."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expert_store.pack.packer import pack_checkpoint
from predictor_service.choice import AUTO_ORDER, choose_predictor
from predictor_service.config import AUTO
from predictor_service.plugins import installed_predictors, make_predictor
from predictor_service.predictor import PredictorSource
from promoe.config import SettingUnfit
from promoe.errors import ModelNotFound, PackDamaged, PromoeError
from promoe.hint import ObservedKind
from tests.families import save_tiny_checkpoint
from tests.plugin_folder import install_plugins
from tests.predictor_service.layer_events import make_spec, source_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PredictorSource:
    folder = Path(tmp_path_factory.mktemp("packed"))
    checkpoint = save_tiny_checkpoint("qwen3_moe", folder / "checkpoint", torch.float32)
    return source_of(pack_checkpoint(checkpoint, folder / "pack").spec, folder / "pack")


def test_auto_takes_the_routers_where_they_can_be_used(packed: PredictorSource) -> None:
    predictor = choose_predictor(AUTO, packed)
    assert predictor.version.predictor == "gate_ahead"
    assert predictor.version.observed is ObservedKind.ROUTER_INPUT


def test_auto_takes_transitions_where_they_cannot_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        predictor = choose_predictor(AUTO, source_of(make_spec(family="strange")))
    assert predictor.version.predictor == "transition"
    assert "Not gate_ahead: How strange routes is not known" in caplog.text


def test_auto_does_not_hide_a_damaged_pack(tmp_path: Path) -> None:
    with pytest.raises(PackDamaged):
        choose_predictor(AUTO, source_of(make_spec(family="mixtral"), tmp_path))


def test_an_artifact_that_was_asked_for_is_not_passed_over(packed: PredictorSource, tmp_path: Path) -> None:
    with pytest.raises((PromoeError, SettingUnfit)) as caught:
        choose_predictor(AUTO, replace(packed, artifact=tmp_path / "missing.safetensors"))
    assert "learned" in str(caught.value) or "missing.safetensors" in str(caught.value)


def test_what_was_named_is_made_or_refused(packed: PredictorSource) -> None:
    assert choose_predictor("transition", packed).version.version == "transition@1"
    with pytest.raises(ModelNotFound):
        choose_predictor("oracle", packed)
    with pytest.raises(SettingUnfit, match=r"is 'crystal'; installed: auto, frequency, gate_ahead,.*transition"):
        choose_predictor("crystal", packed)


def test_a_lookahead_is_given_or_refused(packed: PredictorSource) -> None:
    assert choose_predictor("gate_ahead", replace(packed, lookahead=1)).version.lookaheads == (1,)
    with pytest.raises(SettingUnfit, match=r"predictor\.lookahead is 9; frequency@1\+l3 predicts 3 layers ahead"):
        choose_predictor("frequency", replace(packed, lookahead=9))
    with pytest.raises(SettingUnfit, match="none@1 predicts nothing"):
        choose_predictor("none", replace(packed, lookahead=1))


def test_the_last_of_the_order_always_fits() -> None:
    assert make_predictor(AUTO_ORDER[-1], source_of(make_spec())).version.predictor == AUTO_ORDER[-1]


def test_other_distributions_plugins_are_found_on_the_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = installed_predictors().keys()
    assert "echo" not in before
    monkeypatch.syspath_prepend(install_plugins(tmp_path))
    assert installed_predictors().keys() == {*before, "echo", "slow", "hanging", "failing", "unmade", "lost"}
    assert list(installed_predictors()) == sorted(installed_predictors())
    assert make_predictor("echo", source_of(make_spec())).version.version == "echo@7"
    with pytest.raises(SettingUnfit, match="no_such_module:Echo cannot be loaded: No module named"):
        make_predictor("lost", source_of(make_spec()))
    with pytest.raises(RuntimeError, match="cannot even be made"):
        make_predictor("unmade", source_of(make_spec()))
