"""A model's footprint and needs for planning tests, without a model."""

from pathlib import Path

from compute_node.config import ComputeConfig
from compute_node.memory_plan import MemoryNeeds
from compute_node.planning.device_needs import DeviceNeeds
from promoe.footprint import ModelFootprint
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

MIB = 1 << 20
DENSE_NBYTES = 50 * MIB


def small_spec(dtype: Dtype = Dtype.BFLOAT16) -> ModelSpec:
    """4 MoE layers of 8 experts, 2 per token, 384 KiB each in bfloat16."""
    return ModelSpec(
        name="small",
        family="qwen3_moe",
        fingerprint="",
        num_moe_layers=4,
        num_experts=8,
        experts_per_token=2,
        hidden_size=256,
        vocab_size=1000,
        max_context_tokens=4096,
        layout=ExpertLayout.of(dtype, {"gate_up_proj": (512, 256), "down_proj": (256, 256)}),
    )


def small_footprint(dtype: Dtype = Dtype.BFLOAT16) -> ModelFootprint:
    """Of `small_spec`, unpacked."""
    config: dict[str, object] = {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1000,
    }
    return ModelFootprint(
        spec=small_spec(dtype),
        config=config,
        dense_nbytes=DENSE_NBYTES,
        lookup_nbytes=10 * MIB,
        arena_nbytes=20 * MIB,
        pack_nbytes=70 * MIB,
        source_nbytes=0,
        source_folder="",
        is_packed=False,
        read_from="a test",
    )


def config(**settings: object) -> ComputeConfig:
    """A node's configuration."""
    return ComputeConfig(pack=Path("p"), store_endpoint="unix:s", **settings)  # type: ignore[arg-type]


def device_needs(
    free_nbytes: int, dtype: Dtype = Dtype.BFLOAT16, *, is_asked_gpu: bool = False, **settings: object
) -> DeviceNeeds:
    """1 KiB of KV a token, 2 MiB of workspace."""
    needs = MemoryNeeds(dense_nbytes=DENSE_NBYTES, kv_nbytes_per_token=1024, workspace_nbytes=2 * MIB)
    return DeviceNeeds(config(**settings), small_spec(dtype), needs, free_nbytes, is_asked_gpu)
