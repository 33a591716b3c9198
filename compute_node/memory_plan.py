"""How much device memory goes to expert slots and how much to KV blocks: decided once, logged once.

Config is what was asked; this is what was decided. Knows bytes, no tensors.
"""

from dataclasses import dataclass
from typing import Final

from transformers import PretrainedConfig

from compute_node.batch_loop import KV_BLOCK_TOKENS
from compute_node.config import ComputeConfig
from promoe.config import SettingUnfit
from promoe.errors import InsufficientMemory
from promoe.model_spec import ModelSpec

BUDGET_SHARE: Final = 0.9
"""Of free memory, when no budget is given: the rest is for allocators' fragments and other programs."""

DEFAULT_CONTEXT_TOKENS: Final = 8192
EXPECTED_CONTEXT_TOKENS: Final = 2048
"""What a request is expected to use when KV memory is shared out; a single one may still use the whole context."""

WORKSPACE_ROWS: Final = 16
"""Hidden-sized buffers per token of a step that live at once (projections, residuals, routed copies)."""


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided.

    Attributes:
        slots_per_layer: expert slots of each MoE layer.
        slot_nbytes: one slot, aligned.
        max_context_tokens: longest prompt plus answer.
        num_kv_blocks: over all requests, of `KV_BLOCK_TOKENS` tokens.
        kv_nbytes: what the blocks take.
        workspace_nbytes: set aside for activations.
        dense_nbytes: what the dense weights take.
        num_layers: MoE layers.
    """

    slots_per_layer: int
    slot_nbytes: int
    max_context_tokens: int
    num_kv_blocks: int
    kv_nbytes: int
    workspace_nbytes: int
    dense_nbytes: int
    num_layers: int

    @property
    def slots_nbytes(self) -> int:
        """All slots together."""
        return self.slots_per_layer * self.slot_nbytes * self.num_layers

    def __str__(self) -> str:
        return (
            f"dense weights {_mib(self.dense_nbytes)}, expert slots {self.slots_per_layer} per layer "
            f"{_mib(self.slots_nbytes)}, KV blocks {self.num_kv_blocks} {_mib(self.kv_nbytes)}, "
            f"workspace {_mib(self.workspace_nbytes)}, context {self.max_context_tokens} tokens"
        )


@dataclass(frozen=True)
class MemoryNeeds:
    """What a model needs beside its slots, in bytes.

    Attributes:
        dense_nbytes: dense weights, already on the device.
        kv_nbytes_per_token: over all layers.
        workspace_nbytes: activations of the largest step.
    """

    dense_nbytes: int
    kv_nbytes_per_token: int
    workspace_nbytes: int

    @classmethod
    def of(
        cls, model_config: PretrainedConfig, spec: ModelSpec, dense_nbytes: int, config: ComputeConfig
    ) -> "MemoryNeeds":
        """Upper bounds from the model's configuration (a latent KV cache takes less than counted here)."""
        text = model_config.get_text_config()
        heads = int(text.num_attention_heads)
        # Optional in Transformers' configurations, hence the defaults.
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(text, "head_dim", None) or spec.hidden_size // heads)
        itemsize = spec.layout.dtype.itemsize
        kv_nbytes_per_token = 2 * int(text.num_hidden_layers) * kv_heads * head_dim * itemsize
        rows_nbytes = (
            config.max_batch_tokens * spec.hidden_size * itemsize * (WORKSPACE_ROWS + 2 * spec.experts_per_token)
        )
        # Logits are float32 and live about four times: raw, processed, sorted, softmax.
        logits_nbytes = config.max_concurrent_requests * spec.vocab_size * 4 * 4
        return cls(dense_nbytes, kv_nbytes_per_token, rows_nbytes + logits_nbytes)


def plan_memory(config: ComputeConfig, spec: ModelSpec, needs: MemoryNeeds, free_nbytes: int) -> MemoryPlan:
    """Shares the budget out.

    Args:
        config: what was asked.
        spec: the model.
        needs: what it takes beside slots.
        free_nbytes: of the device, with the dense weights loaded.

    Raises:
        InsufficientMemory: names the number that is short and the flag that mends it.
        SettingUnfit: a cache rate below one slot per layer, or more slots than experts.
    """
    slot_nbytes = spec.layout.blob_stride_nbytes
    context = planned_context(config, spec)
    budget_nbytes = free_budget(config, needs, free_nbytes) - needs.workspace_nbytes
    least_kv_nbytes = context * needs.kv_nbytes_per_token
    asked_slots = slots_asked_for(config, spec)
    layer_slots_nbytes = slot_nbytes * spec.num_moe_layers
    least_nbytes = (asked_slots or 1) * layer_slots_nbytes + least_kv_nbytes
    if least_nbytes > budget_nbytes:
        raise InsufficientMemory(
            _shortage(asked_slots or 1, layer_slots_nbytes, least_kv_nbytes, budget_nbytes, context)
        )
    expected_tokens = max(context, config.max_concurrent_requests * min(context, EXPECTED_CONTEXT_TOKENS))
    expected_kv_nbytes = expected_tokens * needs.kv_nbytes_per_token
    slots = asked_slots
    if slots is None:
        most = max(1, (budget_nbytes - expected_kv_nbytes) // layer_slots_nbytes)
        slots = min(spec.num_experts, most)
    kv_tokens = min(expected_tokens, (budget_nbytes - slots * layer_slots_nbytes) // max(1, needs.kv_nbytes_per_token))
    num_kv_blocks = max(-(-context // KV_BLOCK_TOKENS), kv_tokens // KV_BLOCK_TOKENS)
    return MemoryPlan(
        slots_per_layer=slots,
        slot_nbytes=slot_nbytes,
        max_context_tokens=context,
        num_kv_blocks=num_kv_blocks,
        kv_nbytes=num_kv_blocks * KV_BLOCK_TOKENS * needs.kv_nbytes_per_token,
        workspace_nbytes=needs.workspace_nbytes,
        dense_nbytes=needs.dense_nbytes,
        num_layers=spec.num_moe_layers,
    )


def planned_context(config: ComputeConfig, spec: ModelSpec) -> int:
    """Tokens of the longest prompt plus answer."""
    return min(config.max_context_tokens or DEFAULT_CONTEXT_TOKENS, spec.max_context_tokens)


def free_budget(config: ComputeConfig, needs: MemoryNeeds, free_nbytes: int) -> int:
    """Bytes for slots, KV and workspace, beside the dense weights.

    Raises:
        InsufficientMemory: more was asked for than is free.
    """
    if config.memory_bytes is None:
        return int(free_nbytes * BUDGET_SHARE)
    budget_nbytes = config.memory_bytes - needs.dense_nbytes
    if budget_nbytes > free_nbytes:
        raise InsufficientMemory(
            f"--memory asks for {_mib(config.memory_bytes)}, but beside the dense weights ({_mib(needs.dense_nbytes)}) "
            f"only {_mib(free_nbytes)} are free. Lower --memory."
        )
    return budget_nbytes


def slots_asked_for(config: ComputeConfig, spec: ModelSpec) -> int | None:
    """Per layer; None: as many as fit.

    Raises:
        SettingUnfit: less than one, or more than there are experts.
    """
    if config.expert_slots is not None:
        if config.expert_slots > spec.num_experts:
            raise SettingUnfit(
                f"compute.expert_slots is {config.expert_slots}; allowed: 1 to {spec.num_experts}, experts per layer"
            )
        return config.expert_slots
    if config.cache_rate is None:
        return None
    slots = int(config.cache_rate * spec.num_experts + 0.5)
    if slots < 1:
        raise SettingUnfit(
            f"compute.cache_rate is {config.cache_rate}; the smallest for {spec.num_experts} experts per layer is "
            f"{1 / spec.num_experts:.4f}, one slot"
        )
    return slots


def _shortage(slots: int, layer_slots_nbytes: int, kv_nbytes: int, budget_nbytes: int, context: int) -> str:
    slots_nbytes = slots * layer_slots_nbytes
    return (
        f"{slots} expert slots per layer need {_mib(slots_nbytes)} and one context of {context} tokens needs "
        f"{_mib(kv_nbytes)} of KV memory, but the budget leaves {_mib(max(0, budget_nbytes))}: "
        f"{_mib(slots_nbytes + kv_nbytes - budget_nbytes)} short. Lower --cache-rate or --expert-slots, lower "
        "--max-context, or raise --memory."
    )


def _mib(nbytes: int) -> str:
    mib = nbytes / 2**20
    return f"{mib:.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB"
