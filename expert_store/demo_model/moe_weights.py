"""Dense base weights + delta = the demo model's weights, named as Transformers' Qwen2MoE checkpoints name them.

Shapes: D hidden, F dense FFN neurons (permuted: S shared, then E experts of I), E experts.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch

from expert_store.demo_model.delta import Delta, LayerDelta, MoeGeometry
from expert_store.demo_model.dense_weights import DenseLayer, DenseWeights


def outer_tensors(dense: DenseWeights, delta: Delta) -> dict[str, torch.Tensor]:
    """The tensors outside the decoder layers; the output head is tied to the embedding."""
    return {
        "model.embed_tokens.weight": dense.embedding().bfloat16(),
        "model.norm.weight": delta.final_norm_D.bfloat16(),
    }


def layer_tensors(layer: int, dense: DenseLayer, delta: LayerDelta, geometry: MoeGeometry) -> dict[str, torch.Tensor]:
    """All bfloat16 tensors of decoder layer `layer`, by checkpoint key."""
    parts = dict(_attention_tensors(dense, delta))
    parts |= {
        "input_layernorm.weight": delta.input_norm_D.bfloat16(),
        "post_attention_layernorm.weight": delta.post_attention_norm_D.bfloat16(),
        "mlp.gate.weight": delta.router_ED.bfloat16(),
        # Zero makes the shared expert's sigmoid gate exactly one half for every token.
        "mlp.shared_expert_gate.weight": torch.zeros(1, delta.router_ED.shape[1], dtype=torch.bfloat16),
    }
    parts |= _expert_tensors(dense, delta, geometry)
    return {f"model.layers.{layer}.{name}": tensor.contiguous() for name, tensor in parts.items()}


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, shapes and bytes of bfloat16 tensors, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _attention_tensors(dense: DenseLayer, delta: LayerDelta) -> Iterator[tuple[str, torch.Tensor]]:
    rows = {"q": dense.q_QD, "k": dense.k_RD, "v": dense.v_RD}
    merged, first = _adapt(torch.cat(list(rows.values())), delta.lora["q"]), 0
    for name, weight in rows.items():
        yield f"self_attn.{name}_proj.weight", merged[first : first + len(weight)].bfloat16()
        first += len(weight)
    yield "self_attn.o_proj.weight", _adapt(dense.o_DQ, delta.lora["o"]).bfloat16()


def _expert_tensors(dense: DenseLayer, delta: LayerDelta, geometry: MoeGeometry) -> dict[str, torch.Tensor]:
    order = delta.permutation_F
    stacked = _adapt(torch.cat([dense.gate_FD[order], dense.up_FD[order]]), delta.lora["g"])
    gate_FD, up_FD = stacked.chunk(2)
    down_DF = _adapt(dense.down_DF[:, order], delta.lora["d"])

    def ffn(prefix: str, first: int, last: int, scale: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": gate_FD[first:last].bfloat16(),
            f"{prefix}.up_proj.weight": up_FD[first:last].bfloat16(),
            f"{prefix}.down_proj.weight": (scale * down_DF[:, first:last]).bfloat16(),
        }

    num_shared, width = geometry.num_shared, geometry.expert_neurons
    parts = ffn("mlp.shared_expert", 0, num_shared, 2)  # twice, to undo the gate of one half
    for expert in range(geometry.num_experts):
        first = num_shared + expert * width
        # Routing weights sum to 1 but the dense layer adds all neurons up: scale by the experts per token.
        parts |= ffn(f"mlp.experts.{expert}", first, first + width, geometry.experts_per_token)
    return parts


def _adapt(weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """W + B A in float64: sums of bfloat16 products are exact there, so that every machine builds the same bits."""
    lora_b, lora_a = factors
    return weight.double() + lora_b.double() @ lora_a.double()
