"""Tiny random checkpoints of many MoE families: the fixtures for "any family of Transformers' experts interface".

Each is written in its family's own checkpoint format (Transformers reverts its weight conversion on save), with a
byte-level tokenizer, so that any text goes in and comes out. Weights are seeded, wide enough that greedy text is
no loop of one token and that routing differs between tokens.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

HIDDEN_SIZE = 32
EXPERT_HIDDEN_SIZE = 24
NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
NUM_LAYERS = 3

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, START_OF_TURN_ID, END_OF_TURN_ID = 0, 1, 2
MERGES = ("h e", "Ġ t", "Ġt he", "i n", "e r", "a n", "Ġ a", "o n", "r e", "Ġ s", "an d", "o u", "Ġ Ġ")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_BYTE_ALPHABET = tuple(sorted(ByteLevel.alphabet()))
VOCABULARY = (*SPECIAL_TOKENS, *_BYTE_ALPHABET, *(merge.replace(" ", "") for merge in MERGES))

ConfigFactory = Callable[[], PreTrainedConfig]


def _config(family: str, **settings: object) -> ConfigFactory:
    """The sizes all families share, overridden and completed by the family's own names."""
    shared: dict[str, object] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": EXPERT_HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": START_OF_TURN_ID,
        "eos_token_id": END_OF_TURN_ID,
        "pad_token_id": END_OF_TEXT_ID,
    }
    return lambda: AutoConfig.for_model(family, **(shared | settings))


_NARROW_EXPERTS = {"moe_intermediate_size": EXPERT_HIDDEN_SIZE, "intermediate_size": 48}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,  # keys are 16 wide: the difference is what a paged KV cache cannot hold
}
_DEEPSEEK_ROUTING = {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}

FAMILIES: dict[str, ConfigFactory] = {
    "mixtral": _config("mixtral", num_local_experts=NUM_EXPERTS),
    "qwen2_moe": _config(
        "qwen2_moe", **_NARROW_EXPERTS, num_experts=NUM_EXPERTS, shared_expert_intermediate_size=32, norm_topk_prob=True
    ),
    "qwen3_moe": _config("qwen3_moe", **_NARROW_EXPERTS, num_experts=NUM_EXPERTS, norm_topk_prob=True),
    "deepseek_v2": _config(
        "deepseek_v2",
        **_NARROW_EXPERTS,
        **_LATENT_ATTENTION,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "deepseek_v3": _config(
        "deepseek_v3", **_NARROW_EXPERTS, **_LATENT_ATTENTION, **_DEEPSEEK_ROUTING, first_k_dense_replace=1
    ),
    "olmoe": _config("olmoe", num_experts=NUM_EXPERTS),
    "gpt_oss": _config(
        "gpt_oss",
        num_local_experts=NUM_EXPERTS,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4_moe": _config("glm4_moe", **_NARROW_EXPERTS, **_DEEPSEEK_ROUTING, first_k_dense_replace=1, use_qk_norm=True),
    "granitemoe": _config("granitemoe", num_local_experts=NUM_EXPERTS, residual_multiplier=0.5, logits_scaling=0.5),
    "phimoe": _config("phimoe", num_local_experts=NUM_EXPERTS),
    "ernie4_5_moe": _config(
        "ernie4_5_moe",
        **_NARROW_EXPERTS,
        moe_num_experts=NUM_EXPERTS,
        moe_k=EXPERTS_PER_TOKEN,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=NUM_LAYERS - 1,
    ),
    "hunyuan_v1_moe": _config(
        "hunyuan_v1_moe", num_experts=NUM_EXPERTS, moe_topk=EXPERTS_PER_TOKEN, moe_intermediate_size=EXPERT_HIDDEN_SIZE
    ),
    "dots1": _config("dots1", **_NARROW_EXPERTS, **_DEEPSEEK_ROUTING, first_k_dense_replace=1, norm_topk_prob=True),
    "minimax_m2": _config("minimax_m2", num_local_experts=NUM_EXPERTS),
    "flex_olmo": _config("flex_olmo", num_experts=NUM_EXPERTS),
    "exaone_moe": _config(
        "exaone_moe",
        **_NARROW_EXPERTS,
        num_experts=NUM_EXPERTS,
        num_shared_experts=1,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "solar_open": _config("solar_open", **_NARROW_EXPERTS, n_routed_experts=NUM_EXPERTS, n_shared_experts=1),
    "afmoe": _config(
        "afmoe", **_NARROW_EXPERTS, num_experts=NUM_EXPERTS, num_shared_experts=1, num_dense_layers=1, sliding_window=16
    ),
    "glm4_moe_lite": _config(
        "glm4_moe_lite",
        **_NARROW_EXPERTS,
        **_LATENT_ATTENTION,
        **_DEEPSEEK_ROUTING,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "qwen3_next": _config(
        "qwen3_next",
        **_NARROW_EXPERTS,
        num_experts=NUM_EXPERTS,
        shared_expert_intermediate_size=32,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "minimax": _config(
        "minimax",
        num_local_experts=NUM_EXPERTS,
        block_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
}
"""Family (Transformers' model type) to its tiny configuration."""

SECOND_ENGINE_FAMILIES = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "qwen3_next", "minimax"})
"""Families whose cache continuous batching cannot hold: latent attention (keys and values of different width) and
linear attention (a state instead of keys). All others in FAMILIES run on continuous batching."""


def make_tiny_model(family: str) -> PreTrainedModel:
    """The family's model with seeded float32 weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        assert isinstance(model, PreTrainedModel), f"{family} is a Transformers model"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomise(name, parameter)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.1 * torch.randn_like(buffer))
    model.train(False)
    return model


def save_tiny_checkpoint(family: str, out_dir: Path, dtype: torch.dtype, *, sharded: bool = False) -> Path:
    """Write the family's tiny model as a Hugging Face checkpoint folder with tokenizer; returns `out_dir`.

    `sharded` splits the weights into several safetensors files with an index.
    """
    model = make_tiny_model(family)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Hub checkpoints keep this one in float32 whatever the rest is.
        if tensor.is_floating_point() and not name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(out_dir, max_shard_size="40KB" if sharded else "1GB")
    write_tokenizer(out_dir)
    return out_dir


def write_tokenizer(out_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of the tiny byte-level tokenizer."""
    vocabulary = {token: token_id for token_id, token in enumerate(VOCABULARY)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(out_dir / "tokenizer.json"))
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": SPECIAL_TOKENS[START_OF_TURN_ID],
        "eos_token": SPECIAL_TOKENS[END_OF_TURN_ID],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT_ID],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _randomise(name: str, parameter: torch.nn.Parameter) -> None:
    """Norm weights near 1, biases small, matrices scaled by fan-in; what linear attention integrates is left alone."""
    if name.endswith(("A_log", "dt_bias", "conv1d.weight")):
        return
    noise = torch.randn_like(parameter)
    if "norm" in name:
        parameter.copy_(parameter + 0.1 * noise)
    elif parameter.ndim == 1 or name.endswith("_bias"):
        parameter.copy_(0.1 * noise)
    elif "embed_tokens" in name:
        parameter.copy_(noise)
    else:
        fan_in = parameter.shape[-1]
        parameter.copy_(1.5 * noise / fan_in**0.5)
