"""The student: the base Llama whose FFNs route and whose linears carry LoRA factors, and back to a delta.

Shapes: T tokens, D hidden, F dense FFN neurons (permuted: shared first), E experts.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import nn
from transformers import LlamaForCausalLM

from expert_store.demo_model.delta import Delta, LayerDelta, MoeGeometry


class AdaptedLinear(nn.Module):
    """A frozen bfloat16 weight [out, in] plus trained factors B [out, R] and A [R, in]."""

    def __init__(self, weight: torch.Tensor, lora_b: torch.Tensor, lora_a: nn.Parameter) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.clone())
        self.lora_b = nn.Parameter(lora_b.clone())
        self.lora_a = lora_a  # shared by linears that read the same input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        update = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return F.linear(x, self.weight) + update


class TrainedNorm(nn.Module):
    """RMS norm with a float32 weight whose result keeps the input's dtype."""

    def __init__(self, weight_D: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_D.clone())
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., D]."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self._eps).to(x.dtype)


class RoutedFfn(nn.Module):
    """The dense FFN with all neurons computed and those of experts not routed weighed with zero."""

    def __init__(self, gate_up: AdaptedLinear, down: AdaptedLinear, router_ED: torch.Tensor, geometry: MoeGeometry):
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.router = nn.Parameter(router_ED.clone())
        self._geometry = geometry
        self.load_balance = torch.zeros(())
        """Load-balancing loss of the last forward pass; 1 when all experts are used alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        geometry = self._geometry
        gate, up = self.gate_up(x).chunk(2, -1)
        activation = F.silu(gate) * up
        logits = F.linear(x.float(), self.router)
        top_logits, topk_ids = logits.topk(geometry.experts_per_token, -1)
        # Times experts per token, as the checkpoint's routed down_proj is.
        weights = torch.zeros_like(logits).scatter(-1, topk_ids, top_logits.softmax(-1) * geometry.experts_per_token)
        self._note_load(logits, topk_ids)
        shared, routed = activation.tensor_split([geometry.num_shared], -1)
        routed = routed.unflatten(-1, (geometry.num_experts, -1)) * weights.to(x.dtype).unsqueeze(-1)
        output = self.down(torch.cat([shared, routed.flatten(-2)], -1))
        assert isinstance(output, torch.Tensor), "a linear gives a tensor"
        return output

    def _note_load(self, logits: torch.Tensor, topk_ids: torch.Tensor) -> None:
        probability_E = logits.softmax(-1).flatten(0, 1).mean(0)
        used_E = torch.zeros_like(logits).scatter(-1, topk_ids, 1.0).flatten(0, 1).mean(0)
        geometry = self._geometry
        self.load_balance = (probability_E * used_E).sum() * geometry.num_experts / geometry.experts_per_token


def make_student(llama: LlamaForCausalLM, delta: Delta) -> LlamaForCausalLM:
    """Turn `llama` (the base, which is changed) into the student that `delta` describes; only its part is trainable."""
    eps = llama.config.rms_norm_eps
    for layer, part in zip(llama.model.layers, delta.layers, strict=True):
        order, attention, mlp = part.permutation_F, layer.self_attn, layer.mlp
        b_qkv, a_qkv = part.lora["q"]
        shared_a, first = nn.Parameter(a_qkv.clone()), 0
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = attention.get_submodule(name).weight
            attention.register_module(name, AdaptedLinear(weight, b_qkv[first : first + len(weight)], shared_a))
            first += len(weight)
        attention.register_module("o_proj", _adapted(attention.o_proj.weight, part, "o"))
        gate_up = _adapted(torch.cat([mlp.gate_proj.weight[order], mlp.up_proj.weight[order]]), part, "g")
        down = _adapted(mlp.down_proj.weight[:, order], part, "d")
        layer.register_module("mlp", RoutedFfn(gate_up, down, part.router_ED, delta.geometry))
        layer.register_module("input_layernorm", TrainedNorm(part.input_norm_D, eps))
        layer.register_module("post_attention_layernorm", TrainedNorm(part.post_attention_norm_D, eps))
    llama.model.register_module("norm", TrainedNorm(delta.final_norm_D, eps))
    return llama


def routed_ffns(student: LlamaForCausalLM) -> list[RoutedFfn]:
    """The student's FFNs by layer."""
    return [module for module in student.modules() if isinstance(module, RoutedFfn)]


def delta_of(student: LlamaForCausalLM, start: Delta) -> Delta:
    """What the student has learned, as a delta; permutations and geometry are `start`'s."""
    layers = []
    for layer, part in zip(student.model.layers, start.layers, strict=True):
        attention, ffn = layer.self_attn, layer.mlp
        assert isinstance(ffn, RoutedFfn), "a student's FFNs are routed"
        q_proj = _linear(attention.get_submodule("q_proj"))
        qkv = [_linear(attention.get_submodule(name)).lora_b.detach() for name in ("q_proj", "k_proj", "v_proj")]
        o_proj = _linear(attention.get_submodule("o_proj"))
        layers.append(
            LayerDelta(
                permutation_F=part.permutation_F,
                router_ED=ffn.router.detach(),
                input_norm_D=layer.input_layernorm.weight.detach(),
                post_attention_norm_D=layer.post_attention_layernorm.weight.detach(),
                lora={
                    "q": (torch.cat(qkv), q_proj.lora_a.detach()),
                    "o": (o_proj.lora_b.detach(), o_proj.lora_a.detach()),
                    "g": (ffn.gate_up.lora_b.detach(), ffn.gate_up.lora_a.detach()),
                    "d": (ffn.down.lora_b.detach(), ffn.down.lora_a.detach()),
                },
            )
        )
    return Delta(start.geometry, tuple(layers), student.model.norm.weight.detach())


def _adapted(weight: torch.Tensor, part: LayerDelta, target: str) -> AdaptedLinear:
    lora_b, lora_a = part.lora[target]
    return AdaptedLinear(weight, lora_b, nn.Parameter(lora_a.clone()))


def _linear(module: nn.Module) -> AdaptedLinear:
    assert isinstance(module, AdaptedLinear), "a student's linears are adapted"
    return module
