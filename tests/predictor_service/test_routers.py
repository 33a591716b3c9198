"""A pack's routers in numpy choose what the family's own code chooses; what they cannot is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.pack.packer import pack_checkpoint
from predictor_service.predictors.gate_ahead import GateAheadPredictor
from predictor_service.routers import SCORING_OF_FAMILY, Routers, Scoring, read_routers
from promoe.errors import ModelUnsupported, PackDamaged
from promoe.hint import Float32Array, IdArray
from promoe.model_spec import Dtype, ModelSpec
from promoe.pack_manifest import ROUTERS_FILE, PackManifest
from tests.families import FAMILIES, make_tiny_model, save_tiny_checkpoint
from tests.predictor_service.layer_events import make_spec, source_of

UNKNOWN_FAMILIES = {"afmoe", "minimax_m2"}
"""Their routers in a pack lack the correction bias."""


def packed(family: str, folder: Path, dtype: Dtype = Dtype.FLOAT32) -> PackManifest:
    checkpoint = save_tiny_checkpoint(family, folder / "checkpoint", torch.float32)
    return pack_checkpoint(checkpoint, folder / "pack", dtype=dtype)


def routed_by_the_model(family: str, manifest: PackManifest) -> list[tuple[Float32Array, IdArray]]:
    """Per MoE layer what its experts got for a few tokens: `router_input` (R, D) and routing (R, K)."""
    model = make_tiny_model(family)
    seen: dict[str, tuple[Float32Array, IdArray]] = {}
    modules = dict(model.named_modules())
    for name in manifest.layer_modules:

        def note(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            hidden_RD, topk_ids_RK = args[0], args[1]
            seen[name] = (hidden_RD.detach().numpy().copy(), topk_ids_RK.numpy().astype(np.uint16))

        modules[name].register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.arange(40)[None])
    return [seen[name] for name in manifest.layer_modules]


def sets_of(topk_ids_RK: IdArray) -> list[set[int]]:
    return [set(row) for row in topk_ids_RK.tolist()]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & SCORING_OF_FAMILY.keys()))
def test_they_choose_what_the_family_s_own_router_chooses(family: str, tmp_path: Path) -> None:
    manifest = packed(family, tmp_path)
    routers = read_routers(tmp_path / "pack", manifest.spec)
    for layer, (router_input_RD, topk_ids_RK) in enumerate(routed_by_the_model(family, manifest)):
        scores_RE = routers.scores(layer, router_input_RD)
        chosen_RK = np.argsort(-scores_RE, axis=1)[:, : manifest.spec.experts_per_token]
        assert sets_of(chosen_RK.astype(np.uint16)) == sets_of(topk_ids_RK)


def test_every_tested_family_is_known_or_refused_for_a_reason() -> None:
    assert FAMILIES.keys() - SCORING_OF_FAMILY.keys() == UNKNOWN_FAMILIES


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    folder = Path(tmp_path_factory.mktemp("mixtral"))
    return folder / "pack", packed("mixtral", folder, Dtype.BFLOAT16).spec


def test_bfloat16_routers_are_widened(mixtral: tuple[Path, ModelSpec]) -> None:
    pack, spec = mixtral
    routers = read_routers(pack, spec)
    assert routers.weight_LED.dtype == np.float32
    state = make_tiny_model("mixtral").state_dict()
    exact = state["model.layers.1.mlp.gate.weight"].to(torch.bfloat16).float().numpy()
    assert (routers.weight_LED[1] == exact).all()


@pytest.mark.parametrize("family", [*sorted(UNKNOWN_FAMILIES), "no_such_family"])
def test_a_family_whose_rule_is_unknown_is_refused_with_the_known_ones(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=f"How {family} routes is not known.*mixtral, olmoe"):
        GateAheadPredictor(source_of(make_spec(family=family), tmp_path))


def test_a_pack_without_all_routers_is_refused(mixtral: tuple[Path, ModelSpec]) -> None:
    pack, spec = mixtral
    with pytest.raises(ModelUnsupported, match="has no router of 8 experts for 2 of 5 MoE layers"):
        read_routers(pack, replace(spec, num_moe_layers=5))
    with pytest.raises(ModelUnsupported, match="no router of 9 experts for 3 of 3"):
        read_routers(pack, replace(spec, num_experts=9))


@pytest.mark.parametrize("damage", ["missing", "cut", "config"])
def test_damaged_files_are_named(damage: str, mixtral: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    pack, spec = mixtral
    copy = tmp_path / "pack"
    shutil.copytree(pack, copy)
    if damage == "missing":
        (copy / ROUTERS_FILE).unlink()
    elif damage == "cut":
        (copy / ROUTERS_FILE).write_bytes((copy / ROUTERS_FILE).read_bytes()[:-7])
    else:
        (copy / "dense" / "config.json").write_text("[]")
    with pytest.raises(PackDamaged, match=r"config\.json" if damage == "config" else r"routers\.safetensors"):
        read_routers(copy, spec)


def test_losing_groups_rank_behind_and_keep_their_order() -> None:
    zeros_LE = np.zeros((1, 6), np.float32)
    routers = Routers(Scoring.SIGMOID, np.eye(6, dtype=np.float32)[None], zeros_LE, zeros_LE, 3, 1)
    scores_RE = routers.scores(0, np.array([[4, -3, 1, 2, 0, -1]], np.float32))
    assert np.argsort(-scores_RE[0]).tolist() == [3, 2, 0, 4, 5, 1], "the second pair has the best sum"


def test_a_model_without_a_limit_on_groups_has_one(mixtral: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    pack, spec = mixtral
    copy = tmp_path / "pack"
    shutil.copytree(pack, copy)
    config = json.loads((copy / "dense" / "config.json").read_text())
    for settings, groups in (
        ({"n_group": 4, "topk_group": 2}, (4, 2)),
        ({"n_group": 4, "topk_group": 4}, (1, 1)),
        ({"n_group": 3, "topk_group": 1}, (1, 1)),
        ({"n_group": 4, "topk_group": 2, "topk_method": "greedy"}, (1, 1)),
    ):
        (copy / "dense" / "config.json").write_text(json.dumps(config | settings))
        routers = read_routers(copy, spec)
        assert (routers.num_groups, routers.groups_per_token) == groups
