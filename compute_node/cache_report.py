"""What the compute node tells about its expert cache; reads counters that other threads write, takes no locks of theirs
for long."""

from dataclasses import dataclass

from compute_node.cache_stats import PhaseCounters, StepRecorder
from compute_node.config import ComputeConfig
from compute_node.expert_cache import ExpertCache
from compute_node.memory_plan import MemoryPlan
from compute_node.node_report import (
    CacheCounts,
    CacheShapeReport,
    LayerCounts,
    PhaseCounts,
    StoreLinkReport,
)
from compute_node.step_ledger import Phase
from compute_node.store_client import StoreClient, StoreState
from compute_node.transfer import TransferEngine


@dataclass(frozen=True)
class CacheReport:
    """The service's CacheReporter."""

    config: ComputeConfig
    plan: MemoryPlan
    expert_cache: ExpertCache
    transfers: TransferEngine
    recorder: StepRecorder
    store: StoreClient

    def cache_shape(self) -> CacheShapeReport:
        """The plan."""
        policy = self.expert_cache.policy
        blob_nbytes = self.expert_cache.geometry.blob_nbytes
        return CacheShapeReport(
            slots_per_layer=self.plan.slots_per_layer,
            slot_nbytes=self.plan.slot_nbytes,
            cache_rate=self.expert_cache.geometry.cache_rate,
            eviction=policy.eviction,
            chunk_nbytes=policy.chunk_settings(blob_nbytes).chunk_nbytes or blob_nbytes,
            max_chunks_in_flight=policy.max_chunks_in_flight,
        )

    def store_link(self) -> StoreLinkReport:
        """The store, as it is now."""
        return StoreLinkReport(
            endpoint=self.config.store_endpoint,
            attached=self.store.state is StoreState.ATTACHED,
            arena_uuid=self.store.arena_uuid or "",
            arena_kind=self.store.arena_kind or "",
        )

    def cache_counts(self) -> CacheCounts:
        """The counters, as they are now."""
        transfers = self.transfers.stats()
        layers: list[LayerCounts] = []
        evictions = self.expert_cache.evictions
        for layer, counters in enumerate(self.expert_cache.counters):
            occupancy = self.expert_cache.occupancy(layer)
            layers.append(
                LayerCounts(
                    layer, occupancy.resident, occupancy.loading, counters.hits, counters.misses, evictions[layer]
                )
            )
        return CacheCounts(
            prefill=_phase_counts(self.recorder.phases[Phase.PREFILL]),
            decode=_phase_counts(self.recorder.phases[Phase.DECODE]),
            layers=tuple(layers),
            uploaded_nbytes=transfers.uploaded_nbytes,
            link_busy_s=transfers.link_busy_s,
        )


def _phase_counts(counters: PhaseCounters) -> PhaseCounts:
    return PhaseCounts(
        hits=counters.hits,
        misses=counters.misses,
        steps=counters.steps,
        tokens=counters.tokens,
        stall_s=counters.stall_s,
        demand_nbytes=counters.demand_nbytes,
    )
