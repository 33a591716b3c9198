"""The delta: all that turns the dense base model into the demo model, as one small safetensors file.

Per layer it holds the order of the FFN's neurons (shared expert first, then expert after expert), the routers, the
norms and rank-16 LoRA factors. Shapes: L layers, D hidden, F dense FFN neurons, E experts, R LoRA rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from promoe.errors import ModelMismatch

LORA_TARGETS = ("q", "o", "g", "d")
"""What a factor pair adapts: `q` the stacked q, k, v rows; `o` the output projection; `g` the stacked gate and up rows
and `d` the down projection, both in the permuted neuron order."""

_TENSOR_NAMES = {"perm", "r", "n1", "n2", "norm"} | {side + target for target in LORA_TARGETS for side in "AB"}


@dataclass(frozen=True)
class MoeGeometry:
    """How an FFN's neurons are divided: `num_shared` + `num_experts` x `expert_neurons` of them."""

    num_shared: int
    num_experts: int
    expert_neurons: int
    experts_per_token: int


@dataclass(frozen=True)
class LayerDelta:
    """One layer's share of the delta; all but the permutation in float32."""

    permutation_F: torch.Tensor
    router_ED: torch.Tensor
    input_norm_D: torch.Tensor
    post_attention_norm_D: torch.Tensor
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """Target to its factors (B [out, R], A [R, in]); the adapted weight is W + B A."""


@dataclass(frozen=True)
class Delta:
    """The whole delta."""

    geometry: MoeGeometry
    layers: tuple[LayerDelta, ...]
    final_norm_D: torch.Tensor


def load_delta(path: Path) -> Delta:
    """Read a delta file; ModelMismatch when it is damaged or is no delta."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ModelMismatch(f"cannot read the demo model's delta {path}: {error}") from error
    if set(tensors) != _TENSOR_NAMES or not set("SEIK") <= set(metadata):
        raise ModelMismatch(f"{path} is no delta of the demo model: it holds {sorted(tensors)}")
    geometry = MoeGeometry(*(int(metadata[key]) for key in "SEIK"))
    layers = tuple(_layer(tensors, layer) for layer in range(tensors["perm"].shape[0]))
    return Delta(geometry, layers, tensors["norm"].float())


def save_delta(delta: Delta, path: Path, base: str) -> None:
    """Write `delta` in bfloat16; `base` states the file it belongs to."""
    layers = delta.layers
    tensors = {
        "perm": torch.stack([layer.permutation_F for layer in layers]).to(torch.int16),
        "r": torch.stack([layer.router_ED for layer in layers]).bfloat16(),
        "n1": torch.stack([layer.input_norm_D for layer in layers]).bfloat16(),
        "n2": torch.stack([layer.post_attention_norm_D for layer in layers]).bfloat16(),
        "norm": delta.final_norm_D.bfloat16(),
    }
    for target in LORA_TARGETS:
        tensors["B" + target] = torch.stack([layer.lora[target][0] for layer in layers]).bfloat16()
        tensors["A" + target] = torch.stack([layer.lora[target][1] for layer in layers]).bfloat16()
    geometry = delta.geometry
    sizes = (geometry.num_shared, geometry.num_experts, geometry.expert_neurons, geometry.experts_per_token)
    save_file(tensors, path, metadata={**dict(zip("SEIK", map(str, sizes), strict=True)), "base": base})


def _layer(tensors: Mapping[str, torch.Tensor], layer: int) -> LayerDelta:
    return LayerDelta(
        permutation_F=tensors["perm"][layer].long(),
        router_ED=tensors["r"][layer].float(),
        input_norm_D=tensors["n1"][layer].float(),
        post_attention_norm_D=tensors["n2"][layer].float(),
        lora={t: (tensors["B" + t][layer].float(), tensors["A" + t][layer].float()) for t in LORA_TARGETS},
    )
