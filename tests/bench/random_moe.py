"""A full-size MoE model with random weights, made in memory, and its experts in a registered memfd arena.

DeepSeek-V2's architecture (latent attention, one dense layer, then MoE layers with shared experts). Random weights
route at random: speeds are the real model's, hit rates are not, and nothing is said about text.
"""

import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedModel

from compute_node.arena_mapping import ArenaGeometry, ArenaMapping
from compute_node.device.seam import Device
from compute_node.expert_weights import TORCH_DTYPES
from compute_node.model_loader import LoadedModel
from promoe.arena import ARENA_KINDS, HEADER_NBYTES, ArenaHeader, SharedMapping
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

FINGERPRINT: Final = "random weights"
DATA_OFFSET: Final = 2 << 20
POPULATE_NBYTES: Final = 64 << 20


@dataclass(frozen=True)
class MoeShape:
    """Sizes of the model; the first decoder layer is dense and not counted in `num_layers`.

    Attributes:
        num_layers: MoE layers.
        num_shared: shared experts of a layer.
        head_dim: of keys without position, and of values.
        latent: rank of the compressed keys and values.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    num_shared: int
    hidden_size: int
    expert_hidden: int
    dense_hidden: int
    vocab_size: int
    num_heads: int
    head_dim: int
    latent: int

    def spec(self) -> ModelSpec:
        """As a pack of this model would have it."""
        shapes: dict[str, tuple[int, ...]] = {
            "gate_up_proj": (2 * self.expert_hidden, self.hidden_size),
            "down_proj": (self.hidden_size, self.expert_hidden),
        }
        return ModelSpec(
            name="random",
            family="deepseek_v2",
            fingerprint=FINGERPRINT,
            num_moe_layers=self.num_layers,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_context_tokens=4096,
            layout=ExpertLayout.of(Dtype.BFLOAT16, shapes),
        )

    def config(self) -> DeepseekV2Config:
        """Transformers' configuration."""
        return DeepseekV2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.dense_hidden,
            moe_intermediate_size=self.expert_hidden,
            num_hidden_layers=1 + self.num_layers,
            first_k_dense_replace=1,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            kv_lora_rank=self.latent,
            q_lora_rank=None,
            qk_nope_head_dim=self.head_dim,
            qk_rope_head_dim=self.head_dim // 2,
            v_head_dim=self.head_dim,
            n_routed_experts=self.num_experts,
            num_experts_per_tok=self.experts_per_token,
            n_shared_experts=self.num_shared,
            topk_method="greedy",
            max_position_embeddings=4096,
        )


SHAPES: Final = {
    "lite": MoeShape(26, 64, 6, 2, 2048, 1408, 10944, 102400, 16, 128, 512),
    "tiny": MoeShape(4, 16, 2, 1, 128, 64, 256, 1024, 4, 32, 32),
}
"""`lite` is DeepSeek-V2-Lite's: 28.8 GB of experts in bf16."""


def build_model(shape: MoeShape, device: torch.device) -> LoadedModel:
    """The whole model on the device, experts included."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape.config(), dtype=TORCH_DTYPES[shape.spec().layout.dtype]
        )
    model.eval().requires_grad_(False)
    modules = tuple(module for module in model.modules() if hasattr(module, "is_transposed"))
    assert len(modules) == shape.num_layers, "every MoE layer has its experts module"
    experts = {id(parameter) for module in modules for parameter in module.parameters()}
    dense_nbytes = sum(p.nbytes for p in model.parameters() if id(p) not in experts)
    return LoadedModel(model, modules, dense_nbytes)


@dataclass(frozen=True)
class RandomArena:
    """The experts as a compute node has them.

    Attributes:
        mapping: mapped, registered and write-protected by the node's own code.
        spec: whose blobs lie there.
        register_s: how long populating and registering took.
    """

    mapping: ArenaMapping
    spec: ModelSpec
    register_s: float

    def address_of(self, expert: ExpertId) -> int:
        """Where the expert's blob lies in this process."""
        index = expert.layer * self.spec.num_experts + expert.expert
        return self.mapping.address_of(DATA_OFFSET + index * self.spec.layout.blob_stride_nbytes)


@contextmanager
def open_arena(loaded: LoadedModel, spec: ModelSpec, device: Device) -> Iterator[RandomArena]:
    """Copies the modules' experts into a memfd, as a store would fill it, and attaches to it as a node does."""
    stride_nbytes = spec.layout.blob_stride_nbytes
    nbytes = DATA_OFFSET + spec.num_blobs * stride_nbytes
    geometry = ArenaGeometry(uuid4().hex, "memfd", nbytes, DATA_OFFSET, stride_nbytes)
    fd = ARENA_KINDS[geometry.kind].create(nbytes)
    store = SharedMapping(fd, nbytes)
    header = ArenaHeader(geometry.uuid, FINGERPRINT, spec.num_blobs, nbytes, DATA_OFFSET, stride_nbytes).encode()
    assert len(header) <= HEADER_NBYTES, "the header is one page"
    store.view[: len(header)] = header
    _fill(store, loaded, spec, device)
    store.close()
    started_s = time.perf_counter()
    mapping = ArenaMapping(fd, geometry, FINGERPRINT, device.pinning)
    try:
        mapping.register_all()
        yield RandomArena(mapping, spec, time.perf_counter() - started_s)
    finally:
        mapping.close()


def _fill(store: SharedMapping, loaded: LoadedModel, spec: ModelSpec, device: Device) -> None:
    """A layer at a time over one staging buffer."""
    with ThreadPoolExecutor(8) as threads:
        starts = range(0, store.nbytes, POPULATE_NBYTES)
        list(threads.map(lambda start: store.populate(start, min(POPULATE_NBYTES, store.nbytes - start)), starts))
    stride_nbytes = spec.layout.blob_stride_nbytes
    blobs_EB = torch.zeros(spec.num_experts, stride_nbytes, dtype=torch.uint8, device=device.torch_device)
    staged_EB = torch.empty(blobs_EB.shape, dtype=torch.uint8, pin_memory=device.kind == "cuda")
    for layer, module in enumerate(loaded.experts_modules):
        for part in spec.layout.tensors:
            blobs_EB[:, part.offset : part.offset + part.nbytes] = _bytes_of(module, part.name)
        staged_EB.copy_(blobs_EB)
        start = store.address + DATA_OFFSET + layer * staged_EB.nbytes
        ctypes.memmove(start, staged_EB.data_ptr(), staged_EB.nbytes)


def _bytes_of(module: nn.Module, name: str) -> torch.Tensor:
    """(E, bytes) view of one parameter of all experts."""
    parameter = module.get_parameter(name)
    return parameter.detach().reshape(parameter.shape[0], -1).view(torch.uint8)
