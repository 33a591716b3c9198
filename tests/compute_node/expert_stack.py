"""The expert path over plain memory: a model whose experts come out of slots, and no store.

For tests of everything between the experts function and the link. The blobs are cut from the model's own parameters.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from prometheus_client import CollectorRegistry
from torch import nn
from transformers import PreTrainedModel

from compute_node.cache_stats import CacheMetrics, StepRecorder
from compute_node.device.cpu import CpuDevice
from compute_node.device.seam import Device
from compute_node.emulated_transfers import EmulatedTransfers
from compute_node.expert_cache import CacheSurroundings, ExpertCache
from compute_node.expert_path import transfers_over
from compute_node.expert_weights import TORCH_DTYPES, ExpertWeights
from compute_node.hint_inbox import HintInbox
from compute_node.layer_observer import LayerObserver
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, MoeForward, install, register_experts_function
from compute_node.schedule import POLICIES, HintUse, SchedulePolicy
from compute_node.slots import CacheGeometry
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
    policy: SchedulePolicy | None = None
    experts_per_token: int = 1

    def schedule(self) -> SchedulePolicy:
        """The policy as it is, or a reactive one that computes in order of arrival, with the other settings."""
        if self.policy is not None:
            return self.policy
        return replace(
            POLICIES["promoe"],
            hints=HintUse.IGNORE,
            eviction=self.eviction,
            chunk_nbytes=self.chunk_nbytes,
            chunks_demand=True,
            max_chunks_in_flight=self.max_chunks_in_flight,
            serial=self.serial,
        )


@dataclass
class ExpertStack:
    """The parts, for looking into."""

    arena: PlainArena
    expert_cache: ExpertCache
    transfers: TransferEngine | EmulatedTransfers
    ledger: StepLedger
    recorder: StepRecorder
    slots_SB: torch.Tensor
    hints: HintInbox
    observer: LayerObserver


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
    geometry = CacheGeometry(
        num_layers, arena.num_experts, options.slots_per_layer, arena.layout.blob_nbytes, options.experts_per_token
    )
    device = options.device
    slots_SB = device.allocate_slots(num_layers * options.slots_per_layer, arena.layout.blob_stride_nbytes)
    ledger = StepLedger()
    recorder = StepRecorder(ledger, CacheMetrics.register(CollectorRegistry()), device.take_compute_stall_s)
    recorder.begin()
    policy = options.schedule()
    hints = HintInbox()
    observer = LayerObserver(num_layers, device, ())
    with transfers_over(device, policy.chunk_settings(arena.layout.blob_nbytes)) as transfers:
        surroundings = CacheSurroundings(device, transfers, arena.address, hints, wait_begins=device.wait_begins)
        expert_cache = ExpertCache([row.data_ptr() for row in slots_SB], geometry, policy, surroundings)
        ledger.listeners = (observer.begin_step, expert_cache.begin_step)
        yield ExpertStack(arena, expert_cache, transfers, ledger, recorder, slots_SB, hints, observer)
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
            install(module, MoeForward(layer, weights, stack.expert_cache, stack.recorder, stack.observer))
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
        try:
            yield stack
        finally:
            model.set_experts_implementation(before)
