"""Every family through the packer: the pack holds bit for bit what Transformers loads from the checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from expert_store.pack.families import supported_families
from expert_store.pack.packer import pack_checkpoint
from expert_store.pack.verify import verify_pack
from promoe.model_spec import Dtype
from promoe.pack_manifest import ROUTERS_FILE
from tests.expert_store.pack_oracle import assert_pack_equals_checkpoint
from tests.families import (
    EXPERTS_PER_TOKEN,
    FAMILIES,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    VOCABULARY,
    save_tiny_checkpoint,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_holds_what_transformers_loads(family: str, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "model", torch.bfloat16)
    manifest = pack_checkpoint(checkpoint, tmp_path / "pack")

    assert_pack_equals_checkpoint(tmp_path / "pack", manifest, checkpoint)
    assert verify_pack(tmp_path / "pack") == manifest
    spec = manifest.spec
    assert spec.layout.dtype is Dtype.BFLOAT16
    assert (spec.name, spec.family) == ("model", family)
    assert (spec.num_experts, spec.experts_per_token) == (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    assert (spec.hidden_size, spec.vocab_size, spec.max_context_tokens) == (HIDDEN_SIZE, len(VOCABULARY), 512)
    routers = load_file(tmp_path / "pack" / ROUTERS_FILE)
    for layer in range(spec.num_moe_layers):
        shapes = [tuple(tensor.shape) for name, tensor in routers.items() if name.startswith(f"layers.{layer}.")]
        assert shapes.count((NUM_EXPERTS, HIDDEN_SIZE)) == 1, "one router weight for each MoE layer"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_shards_make_the_same_pack_as_one_file(family: str, tmp_path: Path) -> None:
    single = save_tiny_checkpoint(family, tmp_path / "single", torch.float32)
    sharded = save_tiny_checkpoint(family, tmp_path / "sharded", torch.float32, sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1

    packs = [pack_checkpoint(folder, tmp_path / f"{folder.name}.pack") for folder in (single, sharded)]
    assert packs[0].blob_checksums == packs[1].blob_checksums
    assert packs[0].spec.fingerprint == packs[1].spec.fingerprint
    assert_pack_equals_checkpoint(tmp_path / "sharded.pack", packs[1], sharded)


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_dtype_converts_as_transformers_does(family: str, dtype: Dtype, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "model", torch.float32)
    manifest = pack_checkpoint(checkpoint, tmp_path / "pack", dtype=dtype)

    assert manifest.spec.layout.dtype is dtype
    assert_pack_equals_checkpoint(tmp_path / "pack", manifest, checkpoint, getattr(torch, dtype.value))
    packed_config = AutoConfig.from_pretrained(tmp_path / "pack" / "dense")
    assert packed_config.dtype == getattr(torch, dtype.value)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe"])
def test_the_dense_folder_builds_the_same_model(family: str, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "model", torch.bfloat16)
    pack_checkpoint(checkpoint, tmp_path / "pack")

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "pack" / "dense"))
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    assert type(built) is type(expected)
    described = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (built, expected)]
    assert described[0] == described[1]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "pack" / "dense" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_supported_families_are_read_off_transformers() -> None:
    families = supported_families()
    assert set(FAMILIES) <= set(families)
    assert "llama" not in families
    assert list(families) == sorted(families)
