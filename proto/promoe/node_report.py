"""What a compute node says about itself and its expert cache; field names and meanings are those of inference.proto."""

from dataclasses import dataclass
from enum import Enum

from promoe.generation import ExpertUse


class Number(Enum):
    """Number format of the experts."""

    UNSPECIFIED = "unspecified"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class EngineKind(Enum):
    """Which engine serves the model."""

    UNSPECIFIED = "unspecified"
    CONTINUOUS = "continuous"
    INTERLEAVED = "interleaved"


class StoreState(Enum):
    """`frozen`: the store is gone and mapped experts are served on."""

    UNSPECIFIED = "unspecified"
    ATTACHED = "attached"
    FROZEN = "frozen"


@dataclass(frozen=True)
class ServiceInfo:
    """Who answers."""

    version: str
    schema_version: str
    instance_id: str


@dataclass(frozen=True)
class ModelInfo:
    """The served model's geometry."""

    name: str
    family: str
    fingerprint: str
    dtype: Number
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    expert_nbytes: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int

    @property
    def experts_nbytes(self) -> int:
        """Bytes of all experts."""
        return self.num_moe_layers * self.num_experts * self.expert_nbytes


@dataclass(frozen=True)
class DeviceInfo:
    """Where the model is computed and how experts get there."""

    kind: str
    name: str
    reason: str
    link: str
    emulated_link_bytes_per_s: int | None


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    max_context_tokens: int
    max_new_tokens: int
    max_concurrent_requests: int
    max_queued_requests: int
    max_prompt_bytes: int
    max_top_logprobs: int
    max_stop_strings: int


@dataclass(frozen=True)
class CacheShape:
    """The expert cache's size and policy."""

    slots_per_layer: int
    slot_nbytes: int
    cache_rate: float
    eviction: str
    chunk_nbytes: int
    max_chunks_in_flight: int


@dataclass(frozen=True)
class StoreLink:
    """The node's expert store."""

    endpoint: str
    state: StoreState
    arena_uuid: str
    arena_kind: str


@dataclass(frozen=True)
class NodeInfo:
    """Answer of GetInfo."""

    service: ServiceInfo
    model: ModelInfo
    engine: EngineKind
    engine_reason: str
    device: DeviceInfo
    limits: Limits
    expert_cache: CacheShape
    store: StoreLink


@dataclass(frozen=True)
class PhaseStats:
    """What one phase asked of the expert cache since the node started."""

    hits: int
    misses: int
    steps: int
    tokens: int
    stall_s: float
    demand_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Hits ÷ (hits + misses); None before the first access."""
        return ExpertUse(self.hits, self.misses, self.demand_bytes, self.stall_s).hit_rate


@dataclass(frozen=True)
class LayerStats:
    """One MoE layer's slots and accesses."""

    layer: int
    resident: int
    loading: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class CacheStats:
    """Answer of CacheStats: counters since the node started."""

    prefill: PhaseStats
    decode: PhaseStats
    layers: tuple[LayerStats, ...]
    uploaded_bytes: int
    link_busy_s: float
    shape: CacheShape
    running_requests: int
    queued_requests: int
