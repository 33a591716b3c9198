"""Step 3: divides each FFN's neurons into a shared expert and routed ones, and starts the routers.

Shapes: T tokens, D hidden, F dense FFN neurons, N routed neurons (F less the shared), E experts, I neurons of one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from expert_store.demo_model.delta import LORA_TARGETS, Delta, LayerDelta, MoeGeometry

LORA_RANK = 16

_NUM_ROUNDS = 12
_NUM_PROJECTIONS = 256
_ROUTER_SPREAD = 0.3  # standard deviation of the first router logits over experts: soft, so that training can move it


@torch.no_grad()
def start_delta(model: LlamaForCausalLM, texts: Sequence[torch.Tensor], geometry: MoeGeometry, seed: int) -> Delta:
    """A delta with LoRA factors that change nothing yet, calibrated on `texts`, blocks [N, T] of token ids."""
    generator = torch.Generator().manual_seed(seed)
    layers = zip(model.model.layers, ffn_inputs(model, texts), strict=True)
    parts = tuple(_start_layer(layer, ffn_input_TD, geometry, generator) for layer, ffn_input_TD in layers)
    return Delta(geometry, parts, model.model.norm.weight.float())


def ffn_inputs(model: LlamaForCausalLM, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each layer's FFN reads for the given text: [T, D] per layer."""
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, 1)))
        for layer, into in zip(model.model.layers, seen, strict=True)
    ]
    for batch in (batch for blocks_NT in texts for batch in blocks_NT.split(4)):
        model.model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def neuron_order(contribution_TF: torch.Tensor, geometry: MoeGeometry, generator: torch.Generator) -> torch.Tensor:
    """Old index of each neuron in the new order: the busiest are shared, the rest grouped by co-activation."""
    by_energy_F = contribution_TF.pow(2).mean(0).argsort(descending=True)
    shared, routed = by_energy_F[: geometry.num_shared], by_energy_F[geometry.num_shared :]
    routed_TN = contribution_TF[:, routed]
    # A neuron is active where it is among the busiest fifth of its token; its level counts for a little.
    threshold_T1 = routed_TN.kthvalue(max(1, int(0.8 * len(routed))), dim=1, keepdim=True).values
    level_TN = routed_TN / routed_TN.mean(1, keepdim=True).clamp_min(1e-6)
    active_TN = (routed_TN > threshold_T1).float() + 0.2 * level_TN
    centred_NT = (active_TN - active_TN.mean(0)).T
    projection = torch.randn(centred_NT.shape[1], _NUM_PROJECTIONS, generator=generator)
    expert_N = balanced_clusters(F.normalize(centred_NT @ projection, dim=1), geometry.num_experts, generator)
    return torch.cat([shared, routed[expert_N.argsort(stable=True)]])


def balanced_clusters(points_NP: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Spherical k-means with clusters of equal size: the cluster [N] of each unit vector.

    Points that lose most by not getting their best cluster choose first.
    """
    num_points = len(points_NP)
    assert num_points % num_clusters == 0, "the routed neurons divide evenly among the experts"
    centres = points_NP[torch.randperm(num_points, generator=generator)[:num_clusters]].clone()
    cluster_N = torch.zeros(num_points, dtype=torch.long)
    for _ in range(_NUM_ROUNDS):
        similarity = points_NP @ centres.T
        best = similarity.topk(2, dim=1).values
        preferences = similarity.argsort(dim=1, descending=True).tolist()
        room = [num_points // num_clusters] * num_clusters
        for point in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            choice = next(cluster for cluster in preferences[point] if room[cluster])
            cluster_N[point] = choice
            room[choice] -= 1
        centres = torch.stack([F.normalize(points_NP[cluster_N == c].sum(0), dim=0) for c in range(num_clusters)])
    return cluster_N


def ridge_router(ffn_input_TD: torch.Tensor, energy_TE: torch.Tensor) -> torch.Tensor:
    """Router weights [E, D] that predict each expert's energy linearly, scaled to soft logits."""
    gram_DD = ffn_input_TD.T @ ffn_input_TD
    ridge_DD = 0.01 * gram_DD.diagonal().mean() * torch.eye(len(gram_DD))
    weight_DE: torch.Tensor = torch.linalg.solve(gram_DD + ridge_DD, ffn_input_TD.T @ energy_TE)
    logits_TE = ffn_input_TD @ weight_DE
    spread = (logits_TE - logits_TE.mean(1, keepdim=True)).pow(2).mean().sqrt()
    return (weight_DE.T * (_ROUTER_SPREAD / spread)).contiguous()


def _start_layer(
    layer: LlamaDecoderLayer, ffn_input_TD: torch.Tensor, geometry: MoeGeometry, generator: torch.Generator
) -> LayerDelta:
    gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
    activation_TF = F.silu(F.linear(ffn_input_TD, gate)) * F.linear(ffn_input_TD, up)
    contribution_TF = activation_TF.float().abs() * down.float().norm(dim=0)
    order_F = neuron_order(contribution_TF, geometry, generator)
    routed_TN = contribution_TF[:, order_F[geometry.num_shared :]]
    energy_TE = routed_TN.pow(2).unflatten(1, (geometry.num_experts, -1)).sum(-1).sqrt()
    attention = layer.self_attn
    fan_in, attention_width = attention.q_proj.in_features, attention.o_proj.in_features
    qkv_rows = sum(linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    shapes = {
        "q": (qkv_rows, fan_in),
        "o": (fan_in, attention_width),
        "g": (2 * len(order_F), fan_in),
        "d": (fan_in, len(order_F)),
    }
    return LayerDelta(
        permutation_F=order_F,
        router_ED=ridge_router(ffn_input_TD.float(), energy_TE),
        input_norm_D=layer.input_layernorm.weight.float(),
        post_attention_norm_D=layer.post_attention_layernorm.weight.float(),
        lora={target: _neutral_factors(*shapes[target], generator) for target in LORA_TARGETS},
    )


def _neutral_factors(rows: int, fan_in: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, LORA_RANK), torch.randn(LORA_RANK, fan_in, generator=generator) / fan_in**0.5
