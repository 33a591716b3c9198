"""Reads the numbers of a model's geometry off its config, whatever the family calls them."""

from collections import Counter
from typing import Final

from transformers import PretrainedConfig

from expert_store.pack.checkpoint import DTYPE_OF_SAFETENSORS, Checkpoint
from expert_store.pack.meta_model import MetaModel
from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

_EXPERTS_PER_TOKEN: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "moe_top_k",
    "top_k",
)
_MAX_CONTEXT_TOKENS: Final = ("max_position_embeddings", "max_seq_len", "seq_length", "max_sequence_length")


def model_spec(name: str, family: str, model: MetaModel, layout: ExpertLayout) -> ModelSpec:
    """The model's geometry, its fingerprint still empty; raises ModelUnsupported if the config lacks a number."""
    text = model.config.get_text_config()
    return ModelSpec(
        name=name,
        family=family,
        fingerprint="",
        num_moe_layers=len(model.experts),
        num_experts=model.experts[0].num_experts,
        experts_per_token=_number(text, _EXPERTS_PER_TOKEN),
        hidden_size=_number(text, ("hidden_size",)),
        vocab_size=_number(text, ("vocab_size",)),
        max_context_tokens=_number(text, _MAX_CONTEXT_TOKENS),
        layout=layout,
    )


def packed_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> Dtype:
    """What the config says the model is in, else what most of the checkpoint's bytes are in."""
    named = config.dtype or config.get_text_config().dtype
    if named is not None:
        text = str(named).removeprefix("torch.")
        if text not in {dtype.value for dtype in Dtype}:
            raise ModelUnsupported(f"The config's dtype is {text}; promoe packs {', '.join(d.value for d in Dtype)}.")
        return Dtype.parse(text)
    nbytes: Counter[Dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in DTYPE_OF_SAFETENSORS:
            nbytes[DTYPE_OF_SAFETENSORS[tensor.dtype]] += tensor.end - tensor.begin
    if not nbytes:
        raise ModelUnsupported("The checkpoint holds no floating-point weights.")
    return nbytes.most_common(1)[0][0]


def _number(config: PretrainedConfig, keys: tuple[str, ...]) -> int:
    """The first of these keys that the config has; the largest where it is a list with an entry per layer."""
    for key in keys:
        value: object = getattr(config, key, None)
        if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
            return max(int(entry) for entry in value)
        if isinstance(value, int):
            return value
    raise ModelUnsupported(f"The config of this {config.model_type} model has none of {', '.join(keys)}.")
