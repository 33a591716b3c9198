"""The tiny family checkpoints are what the tests that use them believe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.families import (
    FAMILIES,
    NUM_EXPERTS,
    SECOND_ENGINE_FAMILIES,
    VOCABULARY,
    make_tiny_model,
    save_tiny_checkpoint,
)

PROMPTS = ("the quick brown fox", "In the beginning", "1 + 1 = ")
NUM_NEW_TOKENS = 16


def greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """Recomputes the whole text for each token: slow, and independent of any cache."""
    with torch.no_grad():
        for _ in range(NUM_NEW_TOKENS):
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-NUM_NEW_TOKENS:]


def routed_experts(model: PreTrainedModel, ids: list[int]) -> list[torch.Tensor]:
    """`topk_ids_TK` of each MoE layer for the text `ids`."""
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_as_the_same_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(family, tmp_path / family, torch.float32)
    expected, found = make_tiny_model(family), AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype == torch.float32
    ids = torch.randint(3, len(VOCABULARY), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*PROMPTS, "naïve 漢字 🙂\n\ttabs  and spaces"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    texts = [greedy(found, tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert all(len(set(text)) >= 4 for text in texts), "greedy text is no loop of a few tokens"
    assert len({tuple(text) for text in texts}) == len(PROMPTS), "the prompt matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_varies_and_reaches_most_experts(family: str) -> None:
    ids = torch.randint(3, len(VOCABULARY), (64,), generator=torch.Generator().manual_seed(1)).tolist()
    routing = routed_experts(make_tiny_model(family), ids)
    assert len(routing) >= 2
    for topk_ids in routing:
        assert topk_ids.shape == (64, 2)
        assert len(topk_ids.unique()) >= NUM_EXPERTS - 2
        assert len({tuple(sorted(row)) for row in topk_ids.tolist()}) >= 6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_sharded_checkpoint_holds_the_same_tensors(family: str, tmp_path: Path) -> None:
    single = save_tiny_checkpoint(family, tmp_path / "single", torch.bfloat16)
    sharded = save_tiny_checkpoint(family, tmp_path / "sharded", torch.bfloat16, sharded=True)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert not (sharded / "model.safetensors").exists()
    with safe_open(single / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(index["weight_map"])
        for name, shard in index["weight_map"].items():
            with safe_open(sharded / shard, "pt") as part:
                assert torch.equal(part.get_tensor(name), file.get_tensor(name))
            if not name.endswith("e_score_correction_bias"):
                assert file.get_tensor(name).dtype == torch.bfloat16


def test_checkpoints_are_in_the_hubs_format_not_in_transformers_fused_one(tmp_path: Path) -> None:
    names = {
        "mixtral": "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        "qwen3_moe": "model.layers.0.mlp.experts.7.gate_proj.weight",
        "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
        "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    }
    for family, name in names.items():
        folder = save_tiny_checkpoint(family, tmp_path / family, torch.float32)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert name in file.keys(), sorted(file.keys())[:20]  # noqa: SIM118 - not a mapping


def test_the_second_engines_families_are_families() -> None:
    assert set(FAMILIES) > SECOND_ENGINE_FAMILIES
