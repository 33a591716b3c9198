"""The expert path over plain memory: a model whose experts come out of slots, and no store.

For tests of everything between the experts function and the link. The blobs are cut from the model's own parameters.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry
from torch import nn
from transformers import PreTrainedModel

from compute_node.cache_stats import CacheMetrics, StepRecorder
from compute_node.device.cpu import CpuDevice
from compute_node.device.seam import Device
from compute_node.eviction import eviction_named
from compute_node.expert_cache import CacheGeometry, CachePolicy, ExpertCache
from compute_node.expert_weights import TORCH_DTYPES, ExpertWeights
from compute_node.load_queue import ChunkSettings
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, MoeForward, install, register_experts_function
from compute_node.step_ledger import StepLedger
from compute_node.transfer import TransferEngine
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout, align_up

DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


class PlainArena:
    """Blobs one behind the other in ordinary memory."""

    def __init__(self, layout: ExpertLayout, num_layers: int, num_experts: int) -> None:
        self.layout, self.num_experts = layout, num_experts
        self._buffer = ctypes.create_string_buffer(num_layers * num_experts * layout.blob_stride_nbytes + 4096)
        self._base = align_up(ctypes.addressof(self._buffer), 4096)
        self.absent: set[ExpertId] = set()

    def address(self, expert: ExpertId) -> int:
        """Where the blob lies; raises Unavailable for those in `absent`."""
        if expert in self.absent:
            raise Unavailable(f"{expert} is quarantined.")
        return self._base + (expert.layer * self.num_experts + expert.expert) * self.layout.blob_stride_nbytes

    def write(self, expert: ExpertId, tensors: dict[str, torch.Tensor]) -> None:
        """Lays one expert's parameters out as a pack would."""
        for part in self.layout.tensors:
            tensor = tensors[part.name].detach().contiguous().cpu()
            ctypes.memmove(self.address(expert) + part.offset, tensor.data_ptr(), part.nbytes)

    def bytes_of(self, expert: ExpertId) -> bytes:
        """The blob."""
        return ctypes.string_at(self.address(expert), self.layout.blob_nbytes)


@dataclass
class StackOptions:
    """What a test varies."""

    slots_per_layer: int
    chunk_nbytes: int = 1 << 20
    max_chunks_in_flight: int = 2
    eviction: str = "lru"
    serial: bool = False
    device: Device = field(default_factory=CpuDevice)


@dataclass
class ExpertStack:
    """The parts, for looking into."""

    arena: PlainArena
    expert_cache: ExpertCache
    transfers: TransferEngine
    ledger: StepLedger
    recorder: StepRecorder
    slots_SB: torch.Tensor


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that Transformers dispatches, in layer order."""
    return [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "has_gate")]


def arena_of(modules: list[nn.Module]) -> PlainArena:
    """Copies the modules' parameters into an arena."""
    named = [dict(module.named_parameters(recurse=False)) for module in modules]
    first = named[0]
    num_experts = next(iter(first.values())).shape[0]
    dtype: Dtype = DTYPES[next(iter(first.values())).dtype]
    layout = ExpertLayout.of(dtype, {name: tuple(p.shape[1:]) for name, p in first.items()})
    arena = PlainArena(layout, len(modules), num_experts)
    for layer, parameters in enumerate(named):
        for expert in range(num_experts):
            arena.write(ExpertId(layer, expert), {name: p[expert] for name, p in parameters.items()})
    return arena


@contextmanager
def open_stack(arena: PlainArena, num_layers: int, options: StackOptions) -> Iterator[ExpertStack]:
    """Slots, cache and transfer engine over the arena; checks the cache's integrity at the end."""
    geometry = CacheGeometry(num_layers, arena.num_experts, options.slots_per_layer, arena.layout.blob_nbytes)
    device = options.device
    slots_SB = device.allocate_slots(num_layers * options.slots_per_layer, arena.layout.blob_stride_nbytes)
    ledger = StepLedger()
    recorder = StepRecorder(ledger, CacheMetrics.register(CollectorRegistry()), device.take_compute_stall_s)
    recorder.begin()
    policy = CachePolicy(eviction_named(options.eviction), options.serial)
    with TransferEngine(
        device.open_link, ChunkSettings(options.chunk_nbytes, options.max_chunks_in_flight)
    ) as transfers:
        expert_cache = ExpertCache(slots_SB, geometry, device, transfers, arena.address, policy)
        yield ExpertStack(arena, expert_cache, transfers, ledger, recorder, slots_SB)
        expert_cache.check_integrity()


@contextmanager
def served_by_promoe(model: PreTrainedModel, options: StackOptions) -> Iterator[ExpertStack]:
    """Within the context the model's experts come from slots; afterwards it computes as before."""
    register_experts_function()
    modules = experts_modules(model)
    arena = arena_of(modules)
    before = model.config._experts_implementation
    with open_stack(arena, len(modules), options) as stack:
        weights = [ExpertWeights(row, arena.layout) for row in stack.slots_SB]
        for layer, module in enumerate(modules):
            install(module, MoeForward(layer, weights, stack.expert_cache, stack.recorder))
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        try:
            yield stack
        finally:
            model.set_experts_implementation(before)
