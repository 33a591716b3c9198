"""The demo model's weights: what is read from the base, and what the delta makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from expert_store.demo_model.base_model import sha256_of
from expert_store.demo_model.delta import Delta, MoeGeometry, load_delta, save_delta
from expert_store.demo_model.dense_weights import DenseWeights, half_rotation_order
from expert_store.demo_model.moe_weights import weights_digest
from expert_store.demo_model.release import DEMO_RELEASE
from promoe.errors import ModelMismatch
from tests.expert_store.tiny_base import TinyBase, make_delta, make_tiny_base, moe_config, moe_tensors

EVERY_EXPERT = MoeGeometry(num_shared=8, num_experts=4, expert_neurons=4, experts_per_token=4)
HALF_OF_THE_EXPERTS = replace(EVERY_EXPERT, experts_per_token=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_tiny_base(tmp_path_factory.mktemp("base"))


def moe_logits(base: TinyBase, delta: Delta, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(moe_config(delta.geometry)))
    save_file(moe_tensors(base.gguf, delta), folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    with torch.no_grad():
        logits = model(ids).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def test_every_tensor_of_the_base_is_read_back_exactly(base: TinyBase) -> None:
    dense = DenseWeights(base.gguf)
    assert torch.equal(dense.embedding(), base.llama.model.embed_tokens.weight)
    assert torch.equal(dense.final_norm(), base.llama.model.norm.weight)
    assert dense.num_layers == 2
    for i, expected in enumerate(base.llama.model.layers):
        found = dense.layer(i)
        assert torch.equal(found.q_QD, expected.self_attn.q_proj.weight)
        assert torch.equal(found.k_RD, expected.self_attn.k_proj.weight)
        assert torch.equal(found.v_RD, expected.self_attn.v_proj.weight)
        assert torch.equal(found.o_DQ, expected.self_attn.o_proj.weight)
        assert torch.equal(found.gate_FD, expected.mlp.gate_proj.weight)
        assert torch.equal(found.up_FD, expected.mlp.up_proj.weight)
        assert torch.equal(found.down_DF, expected.mlp.down_proj.weight)
        assert torch.equal(found.input_norm_D, expected.input_layernorm.weight)
        assert torch.equal(found.post_attention_norm_D, expected.post_attention_layernorm.weight)


def test_half_rotation_order_gathers_even_rows_before_odd_rows() -> None:
    rows = torch.arange(8.0).unsqueeze(1)
    assert half_rotation_order(rows, num_heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_neutral_delta_with_every_expert_routed_is_the_dense_model(base: TinyBase, tmp_path: Path) -> None:
    """Zero routers weigh all experts alike; scaling and shared-expert gate must then add up to the dense FFN."""
    neutral = make_delta(EVERY_EXPERT, lora_scale=0.0)
    layers = tuple(
        replace(
            layer,
            router_ED=torch.zeros_like(layer.router_ED),
            input_norm_D=dense.input_layernorm.weight.detach(),
            post_attention_norm_D=dense.post_attention_layernorm.weight.detach(),
        )
        for layer, dense in zip(neutral.layers, base.llama.model.layers, strict=True)
    )
    neutral = replace(neutral, layers=layers, final_norm_D=base.llama.model.norm.weight.detach())
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = base.llama(ids).logits
    found = moe_logits(base, neutral, ids, tmp_path / "all")
    half = moe_logits(base, replace(neutral, geometry=HALF_OF_THE_EXPERTS), ids, tmp_path / "half")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(half, expected, rtol=1e-2, atol=1e-2)


def test_lora_factors_are_merged_into_the_weights(base: TinyBase) -> None:
    delta = make_delta(HALF_OF_THE_EXPERTS, lora_scale=0.1)
    tensors = moe_tensors(base.gguf, delta)
    layer, dense = delta.layers[1], DenseWeights(base.gguf).layer(1)
    lora_b, lora_a = layer.lora["q"]
    k_rows = slice(16, 24)  # below the 16 query rows
    expected = (dense.k_RD.double() + (lora_b.double() @ lora_a.double())[k_rows]).bfloat16()
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], expected)
    up_b, up_a = layer.lora["g"]
    expert_2 = slice(8 + 2 * 4, 8 + 3 * 4)
    up_FD = dense.up_FD[layer.permutation_F].double() + (up_b.double() @ up_a.double())[24:]
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], up_FD[expert_2].bfloat16())


def test_the_digest_sees_names_shapes_and_every_bit() -> None:
    tensors = {"a": torch.arange(6, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.bfloat16)}
    other = {**tensors, "a": tensors["a"].clone()}
    assert weights_digest(tensors) == weights_digest(other)
    other["a"].view(torch.int16)[3] ^= 1
    digests = {
        weights_digest(tensors),
        weights_digest(other),
        weights_digest({**tensors, "a": tensors["a"].reshape(2, 3)}),
        weights_digest({"a": tensors["a"], "c": tensors["b"]}),
    }
    assert len(digests) == 4


def test_a_delta_survives_its_file(tmp_path: Path) -> None:
    delta = make_delta(HALF_OF_THE_EXPERTS, lora_scale=0.1)
    save_delta(delta, tmp_path / "delta.safetensors", "some base")
    found = load_delta(tmp_path / "delta.safetensors")
    assert found.geometry == delta.geometry
    assert torch.equal(found.final_norm_D, delta.final_norm_D.bfloat16().float())
    for layer, expected in zip(found.layers, delta.layers, strict=True):
        assert torch.equal(layer.permutation_F, expected.permutation_F)
        assert torch.equal(layer.router_ED, expected.router_ED.bfloat16().float())
        for name, (lora_b, lora_a) in expected.lora.items():
            assert torch.equal(layer.lora[name][0], lora_b.bfloat16().float())
            assert torch.equal(layer.lora[name][1], lora_a.bfloat16().float())


def test_a_file_that_is_no_delta_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header at all")
    with pytest.raises(ModelMismatch, match=r"cannot read .*broken\.safetensors"):
        load_delta(broken)


def test_the_shipped_delta_fits_the_shipped_config(tmp_path: Path) -> None:
    path = Path(str(DEMO_RELEASE.data_dir / "delta.safetensors"))
    config = json.loads((DEMO_RELEASE.data_dir / "config.json").read_text())
    delta = load_delta(path)
    assert sha256_of(path) == DEMO_RELEASE.delta_sha256
    assert delta.geometry.num_shared == config["shared_expert_intermediate_size"]
    assert delta.geometry.num_experts == config["num_experts"]
    assert delta.geometry.expert_neurons == config["moe_intermediate_size"]
    assert delta.geometry.experts_per_token == config["num_experts_per_tok"]
    assert len(delta.layers) == config["num_hidden_layers"]
    neurons = torch.arange(config["intermediate_size"])
    assert all(torch.equal(layer.permutation_F.sort().values, neurons) for layer in delta.layers)
    save_delta(delta, tmp_path / "again.safetensors", "base")
    again = load_delta(tmp_path / "again.safetensors")
    assert all(torch.equal(a.router_ED, b.router_ED) for a, b in zip(again.layers, delta.layers, strict=True))
