"""What cannot be packed is refused with its reason and what can, and leaves no folder behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from expert_store.pack.families import no_experts, refuse_unsupported_config
from expert_store.pack.packer import pack_checkpoint
from promoe.errors import InvalidInput, ModelNotFound, ModelUnsupported, PackDamaged, PromoeError
from tests.families import FAMILIES, save_tiny_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("qwen"), torch.float32)


@pytest.fixture
def model(qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen, tmp_path / "model"))


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def lose_experts_of_one_kind(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".0.mlp.experts." in n and "down_proj" in n]:
        del tensors[name]


def one_expert_too_many(tensors: Tensors) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        like = tensors[f"model.layers.0.mlp.experts.0.{part}.weight"]
        tensors[f"model.layers.0.mlp.experts.8.{part}.weight"] = like.clone()


def a_layer_too_many(tensors: Tensors) -> None:
    tensors["model.layers.7.mlp.experts.0.gate_proj.weight"] = torch.zeros(24, 32)


def one_narrow_expert(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(20, 32)


def all_narrow_down_projections(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".experts." in n and "down_proj" in n]:
        tensors[name] = tensors[name][:, :20].contiguous()


def narrow_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.zeros(31)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lose("model.layers.1.mlp.experts.5.up_proj.weight"), PackDamaged, "holds 7 experts' tensors for"),
        (lose_experts_of_one_kind, PackDamaged, "lacks tensors for model.layers.0.mlp.experts.down_proj"),
        (lose("model.layers.2.self_attn.q_proj.weight"), PackDamaged, "lacks tensors for"),
        (lose("lm_head.weight"), PackDamaged, "lacks tensors for lm_head.weight"),
        (one_expert_too_many, PackDamaged, "holds 9 experts' tensors"),
        (a_layer_too_many, ModelUnsupported, "no place for, for example model.layers.7"),
        (one_narrow_expert, PackDamaged, "do not fit together"),
        (all_narrow_down_projections, PackDamaged, "its config asks for"),
        (narrow_norm, PackDamaged, r"model.norm.weight has shape \(31,\)"),
    ],
)
def test_weights_that_are_not_the_models(
    model: Path, tmp_path: Path, change: Callable[[Tensors], None], error: type[PromoeError], said: str
) -> None:
    rewrite_weights(model, change)
    with pytest.raises(error, match=said):
        pack_checkpoint(model, tmp_path / "pack")
    assert not (tmp_path / "pack" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "martian_moe"}, "unknown to Transformers"),
        ({"model_type": "martian_moe", "auto_map": {"AutoConfig": "x.Y"}}, "runs no remote code"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "vit"}, "not a text-generation model"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised checkpoint .method mxfp4."),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantised checkpoint .method fp8."),
        ({"num_attention_heads": "many"}, "Transformers cannot"),
        ({"dtype": "float64"}, "dtype is float64; promoe packs float32, float16, bfloat16"),
    ],
)
def test_configs_that_cannot_be_packed(model: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    rewrite_config(model, **changes)
    with pytest.raises(ModelUnsupported, match=said):
        pack_checkpoint(model, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_refused_family_is_told_which_work(model: Path, tmp_path: Path) -> None:
    rewrite_config(model, model_type="martian_moe")
    with pytest.raises(ModelUnsupported) as refused:
        pack_checkpoint(model, tmp_path / "pack")
    assert all(family in str(refused.value) for family in FAMILIES)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelUnsupported, match="dense model: it has no MoE layers"):
        pack_checkpoint(tmp_path / "model", tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_family_with_experts_out_of_reach_is_told_from_a_dense_one() -> None:
    config: dict[str, object] = {"model_type": "jetmoe", "num_local_experts": 8}
    refuse_unsupported_config("jet", config)
    assert "outside of Transformers' experts interface" in str(no_experts("jet", config))


def test_tied_tensors_that_differ_are_refused(model: Path, tmp_path: Path) -> None:
    rewrite_config(model, tie_word_embeddings=True)
    with pytest.raises(ModelUnsupported, match="tie_word_embeddings"):
        pack_checkpoint(model, tmp_path / "pack")


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_tensor_is_stored_once_whichever_name_it_had(model: Path, tmp_path: Path, kept: str) -> None:
    rewrite_config(model, tie_word_embeddings=True)
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    expected = load_file(model / "model.safetensors")[kept]
    rewrite_weights(model, lose((both - {kept}).pop()))
    pack_checkpoint(model, tmp_path / "pack")
    stored = load_file(tmp_path / "pack" / "dense" / "model.safetensors")
    assert both & stored.keys() == {"model.embed_tokens.weight"}
    assert torch.equal(stored["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize("named", ["/no/such/folder", "nowhere", "a/b/c", Path("owner/name")])
def test_no_such_model(named: str | Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="There is no folder"):
        pack_checkpoint(named, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_hub_model_while_offline_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expert_store.pack", "owner/no-such-model", str(tmp_path / "pack")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert "hf download" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pack").exists()


def test_folders_that_hold_something_else_are_left_alone(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInput, match="not empty and not a pack"):
        pack_checkpoint(qwen, tmp_path / "full")
    with pytest.raises(InvalidInput, match="is a file"):
        pack_checkpoint(qwen, tmp_path / "file")
    with pytest.raises(InvalidInput, match="not empty and not a pack"):
        pack_checkpoint(qwen, qwen)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", ["manifest.json", ".lock"])
def test_another_program_s_files_are_not_taken_for_a_pack_s(qwen: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"short_name": "a web page"}')
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="not empty and not a pack"):
        pack_checkpoint(qwen, tmp_path)
    assert (tmp_path / name).read_text() == '{"short_name": "a web page"}'
    assert (tmp_path / "dense" / "letter.txt").read_text() == "dear"
