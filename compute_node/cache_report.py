"""What the compute node tells about its expert cache; reads counters that other threads write, takes no locks of theirs
for long."""

from dataclasses import dataclass

from compute_node.cache_map import CacheMapRecorder
from compute_node.cache_stats import PhaseCounters, StepRecorder
from compute_node.config import ComputeConfig
from compute_node.emulated_transfers import EmulatedTransfers
from compute_node.expert_cache import ExpertCache
from compute_node.hint_report import HintReport
from compute_node.memory_plan import MemoryPlan
from compute_node.step_ledger import Phase
from compute_node.store_client import StoreClient
from compute_node.store_client import StoreState as AttachState
from compute_node.transfer import TransferEngine
from promoe.cache_map import CacheMap
from promoe.node_report import (
    CacheShape,
    CacheStats,
    LayerStats,
    PhaseStats,
    PredictorLink,
    PrefetchStats,
    StoreLink,
    StoreState,
)


@dataclass(frozen=True)
class CacheReport:
    """The service's CacheReporter."""

    config: ComputeConfig
    plan: MemoryPlan
    expert_cache: ExpertCache
    transfers: TransferEngine | EmulatedTransfers
    recorder: StepRecorder
    store: StoreClient
    hints: HintReport
    map_recorder: CacheMapRecorder

    def cache_shape(self) -> CacheShape:
        """The plan and the policy."""
        policy = self.expert_cache.policy
        blob_nbytes = self.expert_cache.geometry.blob_nbytes
        return CacheShape(
            slots_per_layer=self.plan.slots_per_layer,
            slot_nbytes=self.plan.slot_nbytes,
            cache_rate=self.expert_cache.geometry.cache_rate,
            eviction=policy.eviction,
            chunk_nbytes=policy.chunk_settings(blob_nbytes).chunk_nbytes or blob_nbytes,
            max_chunks_in_flight=policy.max_chunks_in_flight,
            policy=policy.name,
            slot_split=policy.slot_split.value,
            hints=policy.hints.value,
            early_preemption=policy.early_preemption,
            reorder=policy.reorder,
            stream_prefill=policy.stream_prefill,
            chunks_demand=policy.chunks_demand,
            serial=policy.serial,
        )

    def store_link(self) -> StoreLink:
        """The store, as it is now."""
        is_attached = self.store.state is AttachState.ATTACHED
        return StoreLink(
            endpoint=self.config.store_endpoint,
            state=StoreState.ATTACHED if is_attached else StoreState.FROZEN,
            arena_uuid=self.store.arena_uuid or "",
            arena_kind=self.store.arena_kind or "",
        )

    def predictor_link(self) -> PredictorLink:
        """The predictor, as it is now."""
        return self.hints.predictor_link()

    def cache_stats(self, running_requests: int, queued_requests: int) -> CacheStats:
        """The counters, as they are now."""
        transfers = self.transfers.stats()
        return CacheStats(
            prefill=_phase_stats(self.recorder.phases[Phase.PREFILL]),
            decode=_phase_stats(self.recorder.phases[Phase.DECODE]),
            layers=self._layers(),
            uploaded_bytes=transfers.uploaded_nbytes,
            link_busy_s=transfers.link_busy_s,
            shape=self.cache_shape(),
            running_requests=running_requests,
            queued_requests=queued_requests,
            prefetch=self.prefetch_stats(),
            hints=self.hints.hint_stats(),
        )

    def prefetch_stats(self) -> PrefetchStats:
        """What became of bytes that were loaded ahead."""
        counters = self.expert_cache.prefetch_counters
        return PrefetchStats(
            useful_bytes=counters.useful_nbytes,
            late_bytes=counters.late_nbytes,
            wasted_bytes=counters.wasted_nbytes,
            streamed_bytes=counters.streamed_nbytes,
            link_bytes_per_s=self.transfers.link_bytes_per_s() or 0.0,
        )

    def cache_map(self) -> CacheMap:
        """What every expert is doing now."""
        return self.map_recorder.snapshot()

    def num_resident(self) -> int:
        """Experts that are READY, in all layers."""
        return sum(
            self.expert_cache.occupancy(layer).resident for layer in range(self.expert_cache.geometry.num_layers)
        )

    def _layers(self) -> tuple[LayerStats, ...]:
        cache = self.expert_cache
        evictions = cache.evictions
        layers: list[LayerStats] = []
        for layer, counters in enumerate(cache.counters):
            occupancy = cache.occupancy(layer)
            layers.append(
                LayerStats(
                    layer=layer,
                    resident=occupancy.resident,
                    loading=occupancy.loading,
                    hits=counters.hits,
                    misses=counters.misses,
                    evictions=evictions[layer],
                    prefetching=cache.is_prefetching(layer),
                )
            )
        return tuple(layers)


def _phase_stats(counters: PhaseCounters) -> PhaseStats:
    return PhaseStats(
        hits=counters.hits,
        misses=counters.misses,
        steps=counters.steps,
        tokens=counters.tokens,
        stall_s=counters.stall_s,
        demand_bytes=counters.demand_nbytes,
        late_prefetches=counters.late_prefetches,
        late_prefetch_stall_s=counters.late_prefetch_stall_s,
    )
