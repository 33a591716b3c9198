"""How a budget is shared out: what was asked is given, nothing exceeds the budget, shortages are named."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from compute_node.batch_loop import KV_BLOCK_TOKENS
from compute_node.config import ComputeConfig
from compute_node.memory_plan import BUDGET_SHARE, MemoryNeeds, plan_memory
from promoe.config import SettingUnfit
from promoe.errors import InsufficientMemory
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

MIB = 1 << 20
SPEC = ModelSpec(
    name="m",
    family="qwen2_moe",
    fingerprint="f",
    num_moe_layers=10,
    num_experts=16,
    experts_per_token=4,
    hidden_size=256,
    vocab_size=1000,
    max_context_tokens=4096,
    layout=ExpertLayout.of(Dtype.BFLOAT16, {"gate_up_proj": (512, 256), "down_proj": (256, 256)}),
)
NEEDS = MemoryNeeds(dense_nbytes=50 * MIB, kv_nbytes_per_token=1024, workspace_nbytes=2 * MIB)
SLOTS_NBYTES = SPEC.layout.blob_stride_nbytes * SPEC.num_moe_layers


def config(**settings: object) -> ComputeConfig:
    return ComputeConfig(pack=Path("p"), store_endpoint="unix:s", **settings)  # type: ignore[arg-type]


def test_a_cache_rate_becomes_slots() -> None:
    for rate, slots in ((1.0, 16), (0.5, 8), (0.375, 6), (1 / 16, 1)):
        assert plan_memory(config(cache_rate=rate), SPEC, NEEDS, 1 << 30).slots_per_layer == slots
    assert plan_memory(config(expert_slots=3), SPEC, NEEDS, 1 << 30).slots_per_layer == 3


def test_without_a_wish_the_budget_decides_and_everything_fits_if_it_can() -> None:
    assert plan_memory(config(), SPEC, NEEDS, 1 << 30).slots_per_layer == SPEC.num_experts
    small = plan_memory(config(), SPEC, NEEDS, 40 * MIB)
    assert 1 <= small.slots_per_layer < SPEC.num_experts


@given(
    free_mib=st.integers(1, 400),
    memory_mib=st.none() | st.integers(1, 500),
    slots=st.none() | st.integers(1, 16),
    context=st.none() | st.integers(1, 9000),
    concurrent=st.integers(1, 64),
)
def test_no_plan_exceeds_its_budget_and_every_refusal_is_needed(
    free_mib: int, memory_mib: int | None, slots: int | None, context: int | None, concurrent: int
) -> None:
    asked = config(
        memory_bytes=memory_mib and memory_mib * MIB,
        expert_slots=slots,
        max_context_tokens=context,
        max_concurrent_requests=concurrent,
    )
    free_nbytes = free_mib * MIB
    budget_nbytes = int(free_nbytes * BUDGET_SHARE) if memory_mib is None else memory_mib * MIB - NEEDS.dense_nbytes
    longest = min(context or 8192, SPEC.max_context_tokens)
    least_nbytes = (slots or 1) * SLOTS_NBYTES + longest * NEEDS.kv_nbytes_per_token + NEEDS.workspace_nbytes
    try:
        plan = plan_memory(asked, SPEC, NEEDS, free_nbytes)
    except InsufficientMemory:
        assert least_nbytes > budget_nbytes or budget_nbytes > free_nbytes
        return
    block_nbytes = KV_BLOCK_TOKENS * NEEDS.kv_nbytes_per_token
    assert plan.slots_nbytes + plan.kv_nbytes + plan.workspace_nbytes <= budget_nbytes + block_nbytes
    assert plan.num_kv_blocks * KV_BLOCK_TOKENS >= plan.max_context_tokens == longest, "one request always fits"
    assert slots is None or plan.slots_per_layer == slots


def test_a_shortage_names_the_number_and_the_flag() -> None:
    with pytest.raises(
        InsufficientMemory, match=r"16 expert slots per layer need 60 MiB .* \d+ MiB short.*--cache-rate"
    ):
        plan_memory(config(cache_rate=1.0), SPEC, NEEDS, 20 * MIB)
    with pytest.raises(InsufficientMemory, match=r"--memory asks for 9216 MiB.*only 1024 MiB are free"):
        plan_memory(config(memory_bytes=9 << 30), SPEC, NEEDS, 1 << 30)


def test_wishes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingUnfit, match=r"the smallest for 16 experts per layer is 0.0625"):
        plan_memory(config(cache_rate=0.01), SPEC, NEEDS, 1 << 30)
    with pytest.raises(SettingUnfit, match=r"compute.expert_slots is 17; allowed: 1 to 16"):
        plan_memory(config(expert_slots=17), SPEC, NEEDS, 1 << 30)
    with pytest.raises(ValueError, match="give one of them"):
        config(cache_rate=0.5, expert_slots=2)
    with pytest.raises(ValueError, match=r"compute.cache_rate is 1.5; allowed"):
        config(cache_rate=1.5)
    with pytest.raises(ValueError, match=r"compute.chunk_bytes is 0; allowed: above 0"):
        config(chunk_bytes=0)
    with pytest.raises(ValueError, match=r"compute.max_queued_requests is -1"):
        config(max_queued_requests=-1)


def test_kv_memory_is_counted_from_the_models_own_shape() -> None:
    model = AutoConfig.for_model(
        "qwen2_moe", hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, head_dim=32
    )
    needs = MemoryNeeds.of(model, SPEC, dense_nbytes=7, config=config())
    assert needs.kv_nbytes_per_token == 2 * 6 * 2 * 32 * 2, "keys and values, layers, heads, width, bf16"
    double = dataclasses.replace(SPEC, layout=ExpertLayout.of(Dtype.FLOAT32, {"down_proj": (4, 4)}))
    assert MemoryNeeds.of(model, double, 7, config()).kv_nbytes_per_token == 2 * needs.kv_nbytes_per_token


def test_the_plan_reads_as_one_line() -> None:
    text = str(plan_memory(config(cache_rate=0.5), SPEC, NEEDS, 1 << 30))
    assert "expert slots 8 per layer 30 MiB" in text
    assert "\n" not in text
