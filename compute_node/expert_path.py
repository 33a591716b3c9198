"""Wires one model's experts: slots, transfer engine, expert cache and an experts function per layer."""

from collections.abc import Callable
from dataclasses import dataclass

from compute_node.cache_stats import StepRecorder
from compute_node.config import ComputeConfig
from compute_node.device.seam import Device
from compute_node.eviction import eviction_named
from compute_node.expert_cache import CacheGeometry, CachePolicy, ExpertCache
from compute_node.expert_weights import ExpertWeights
from compute_node.load_queue import ChunkSettings
from compute_node.memory_plan import MemoryPlan
from compute_node.model_loader import LoadedModel
from compute_node.moe_forward import MoeForward, install
from compute_node.transfer import TransferEngine
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec


@dataclass(frozen=True)
class ExpertPath:
    """What the experts function computes from; the transfer engine is not started yet."""

    expert_cache: ExpertCache
    transfers: TransferEngine

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        config: ComputeConfig,
        plan: MemoryPlan,
        device: Device,
        source_address: Callable[[ExpertId], int],
    ) -> "ExpertPath":
        """Allocates the slots.

        Raises:
            InsufficientMemory: the device cannot hold the slots after all.
            SettingUnfit: an unknown eviction.
        """
        policy = CachePolicy(eviction_named(config.eviction), config.serial)
        slots_SB = device.allocate_slots(spec.num_moe_layers * plan.slots_per_layer, plan.slot_nbytes)
        transfers = TransferEngine(device.open_link, ChunkSettings(config.chunk_bytes, config.max_chunks_in_flight))
        geometry = CacheGeometry(spec.num_moe_layers, spec.num_experts, plan.slots_per_layer, spec.layout.blob_nbytes)
        return cls(ExpertCache(slots_SB, geometry, device, transfers, source_address, policy), transfers)

    def install(self, loaded: LoadedModel, spec: ModelSpec, recorder: StepRecorder) -> None:
        """Makes the model's experts modules compute from the slots."""
        weights = [ExpertWeights(row_B, spec.layout) for row_B in self.expert_cache.slots_SB]
        for layer, module in enumerate(loaded.experts_modules):
            install(module, MoeForward(layer, weights, self.expert_cache, recorder))
