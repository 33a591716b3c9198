"""How fast host memory reaches the device: a plain pinned copy, a registered chunk, the transfer engine's bursts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compute_node.device.cpu import DONE
from compute_node.device.seam import Device
from compute_node.load_queue import ChunkSettings
from compute_node.loads import Load
from compute_node.transfer import TransferEngine
from promoe.ids import ExpertId
from tests.bench.random_moe import RandomArena
from tests.bench.report import Sample

PEAK_NBYTES: Final = 256 << 20
REPEATS: Final = 5
CHUNK_NBYTES: Final = (1 << 20, 2 << 20, 4 << 20, 8 << 20)
CHUNKS_IN_FLIGHT: Final = (2, 4)


@dataclass(frozen=True)
class LinkSettings:
    """How the transfer engine uses the link."""

    chunk_nbytes: int
    max_chunks_in_flight: int


def peak_bytes_per_s(device: Device) -> Sample:
    """One 256 MiB copy out of memory that torch pinned, first touched before: what the link can do."""
    on_cuda = device.kind == "cuda"
    source_B = torch.ones(PEAK_NBYTES, dtype=torch.uint8, pin_memory=on_cuda)
    target_B = torch.zeros(PEAK_NBYTES, dtype=torch.uint8, device=device.torch_device)
    rates: list[float] = []
    for _ in range(REPEATS + 1):
        device.synchronize()
        started_s = time.perf_counter()
        target_B.copy_(source_B, non_blocking=True)
        device.synchronize()
        rates.append(PEAK_NBYTES / (time.perf_counter() - started_s))
    return Sample(tuple(rates[1:]))


def registered_bytes_per_s(device: Device, arena: RandomArena) -> Sample:
    """As many whole blobs as one registration holds, in one copy, by the node's own link."""
    geometry = arena.mapping.geometry
    nbytes = arena.mapping.num_blobs_of(0) * geometry.blob_stride_nbytes
    target_B = device.allocate_slots(1, nbytes)
    link = device.open_link()
    rates: list[float] = []
    for _ in range(REPEATS + 1):
        device.synchronize()
        started_s = time.perf_counter()
        link.copy(target_B.data_ptr(), arena.address_of(ExpertId(0, 0)), nbytes).wait_on_host()
        rates.append(nbytes / (time.perf_counter() - started_s))
    return Sample(tuple(rates[1:]))


def burst_bytes_per_s(device: Device, arena: RandomArena, settings: LinkSettings, num_experts: int) -> Sample:
    """Demand loads of a layer's experts: asked for together, until the last one has arrived."""
    blob_nbytes = arena.spec.layout.blob_nbytes
    slots_SB = device.allocate_slots(num_experts, arena.spec.layout.blob_stride_nbytes)
    rates: list[float] = []
    with TransferEngine(
        device.open_link, ChunkSettings(settings.chunk_nbytes, settings.max_chunks_in_flight)
    ) as transfers:
        for burst in range(REPEATS + 1):
            layer = burst % arena.spec.num_moe_layers
            experts = [ExpertId(layer, expert) for expert in range(num_experts)]
            loads = [
                Load(expert, arena.address_of(expert), slots_SB[slot].data_ptr(), blob_nbytes, DONE, DONE)
                for slot, expert in enumerate(experts)
            ]
            started_s = time.perf_counter()
            transfers.submit(loads)
            for load in loads:
                transfers.next_issued([load]).ticket.wait_on_host()
            rates.append(num_experts * blob_nbytes / (time.perf_counter() - started_s))
    return Sample(tuple(rates[1:]))


@dataclass(frozen=True)
class BurstRow:
    """One setting's rates, for one expert and for a layer's experts at once."""

    settings: LinkSettings
    one_expert: Sample
    layer: Sample

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "chunk_bytes": self.settings.chunk_nbytes,
            "max_chunks_in_flight": self.settings.max_chunks_in_flight,
            "one_expert_bytes_per_s": self.one_expert.as_dict(),
            "layer_bytes_per_s": self.layer.as_dict(),
        }


def burst_rows(device: Device, arena: RandomArena) -> list[BurstRow]:
    """Over chunk sizes and chunks in flight."""
    experts_per_token = arena.spec.experts_per_token
    return [
        BurstRow(
            settings,
            burst_bytes_per_s(device, arena, settings, 1),
            burst_bytes_per_s(device, arena, settings, experts_per_token),
        )
        for settings in (LinkSettings(chunk, flight) for chunk in CHUNK_NBYTES for flight in CHUNKS_IN_FLIGHT)
    ]


def gentlest_within(rows: Sequence[BurstRow], share: float) -> LinkSettings:
    """The setting with the fewest bytes in flight whose layer bursts reach `share` of the best one's rate."""
    best = max(row.layer.median for row in rows)
    good = [row.settings for row in rows if row.layer.median >= share * best]
    return min(
        good, key=lambda settings: (settings.chunk_nbytes * settings.max_chunks_in_flight, settings.chunk_nbytes)
    )
