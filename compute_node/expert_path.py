"""Wires one model's experts: slots, transfer engine, expert cache and an experts function per layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compute_node.cache_stats import StepRecorder
from compute_node.device.seam import Device
from compute_node.emulated_transfers import EmulatedTransfers
from compute_node.expert_cache import CacheSurroundings, ExpertCache
from compute_node.expert_weights import ExpertWeights
from compute_node.hint_inbox import HintInbox
from compute_node.layer_observer import LayerObserver
from compute_node.load_queue import ChunkSettings
from compute_node.memory_plan import MemoryPlan
from compute_node.model_loader import LoadedModel
from compute_node.moe_forward import MoeForward, install
from compute_node.schedule import SchedulePolicy
from compute_node.slots import CacheGeometry
from compute_node.transfer import TransferEngine
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec


@dataclass(frozen=True)
class ExpertPath:
    """What the experts function computes from; the transfer engine is not started yet.

    Attributes:
        slots_SB: uint8 (slots, slot bytes) on the device.
    """

    expert_cache: ExpertCache
    transfers: TransferEngine | EmulatedTransfers
    slots_SB: torch.Tensor

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        policy: SchedulePolicy,
        plan: MemoryPlan,
        device: Device,
        source_address: Callable[[ExpertId], int],
        hints: HintInbox,
    ) -> "ExpertPath":
        """Allocates the slots.

        Raises:
            InsufficientMemory: the device cannot hold the slots after all.
        """
        slots_SB = device.allocate_slots(spec.num_moe_layers * plan.slots_per_layer, plan.slot_nbytes)
        transfers = transfers_over(device, policy.chunk_settings(spec.layout.blob_nbytes))
        geometry = CacheGeometry(
            num_layers=spec.num_moe_layers,
            num_experts=spec.num_experts,
            slots_per_layer=plan.slots_per_layer,
            blob_nbytes=spec.layout.blob_nbytes,
            experts_per_token=spec.experts_per_token,
        )
        addresses = [row_B.data_ptr() for row_B in slots_SB]
        surroundings = CacheSurroundings(device, transfers, source_address, hints, wait_begins=device.wait_begins)
        return cls(ExpertCache(addresses, geometry, policy, surroundings), transfers, slots_SB)

    def install(self, loaded: LoadedModel, spec: ModelSpec, recorder: StepRecorder, observer: LayerObserver) -> None:
        """Makes the model's experts modules compute from the slots."""
        weights = [ExpertWeights(row_B, spec.layout) for row_B in self.slots_SB]
        for layer, module in enumerate(loaded.experts_modules):
            install(module, MoeForward(layer, weights, self.expert_cache, recorder, observer))


def transfers_over(device: Device, chunks: ChunkSettings) -> TransferEngine | EmulatedTransfers:
    """A thread for a real link; a played one needs none."""
    if device.played_link_bytes_per_s is not None:
        return EmulatedTransfers(device.played_link_bytes_per_s, chunks)
    return TransferEngine(device.open_link, chunks)
