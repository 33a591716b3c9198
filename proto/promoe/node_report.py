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


class PredictorState(Enum):
    """`none`: the node was started without one; `away`: it is not reached at the moment."""

    UNSPECIFIED = "unspecified"
    NONE = "none"
    CONNECTED = "connected"
    AWAY = "away"


class StepPhase(Enum):
    """Prefill and decode are counted apart."""

    UNSPECIFIED = "unspecified"
    PREFILL = "prefill"
    DECODE = "decode"


class ObservedKind(Enum):
    """Which hidden states a predictor reads."""

    UNSPECIFIED = "unspecified"
    NONE = "none"
    LAYER_INPUT = "layer_input"
    ROUTER_INPUT = "router_input"


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
    policy: str
    slot_split: str
    hints: str
    early_preemption: bool
    reorder: bool
    stream_prefill: bool
    chunks_demand: bool
    serial: bool


@dataclass(frozen=True)
class StoreLink:
    """The node's expert store."""

    endpoint: str
    state: StoreState
    arena_uuid: str
    arena_kind: str


@dataclass(frozen=True)
class ActivePredictor:
    """Which predictor version makes the hints."""

    version: str
    predictor: str
    observed: ObservedKind
    lookaheads: tuple[int, ...]
    calibrated: bool
    wants_routing: bool


@dataclass(frozen=True)
class PredictorSwitch:
    """Another predictor took over; `is_return`: the node went back by itself, and `why` says what had failed."""

    at_unix_s: float
    before: str
    after: str
    who: str
    why: str
    is_return: bool


@dataclass(frozen=True)
class PredictorLink:
    """The node's predictor service.

    Attributes:
        active: None while it is not connected.
        candidate: endpoint of one that is tried out beside it; empty while none is.
        previous: endpoint that the node goes back to by itself if this one fails on trial; empty when there is none.
        last_switch: None before the first.
    """

    endpoint: str
    state: PredictorState
    active: ActivePredictor | None
    candidate: str = ""
    previous: str = ""
    last_switch: PredictorSwitch | None = None


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
    predictor: PredictorLink


@dataclass(frozen=True)
class PhaseStats:
    """What one phase asked of the expert cache since the node started."""

    hits: int
    misses: int
    steps: int
    tokens: int
    stall_s: float
    demand_bytes: int
    late_prefetches: int
    late_prefetch_stall_s: float

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
    prefetching: bool


@dataclass(frozen=True)
class PrefetchStats:
    """Bytes that were loaded before they were needed, by what became of them."""

    useful_bytes: int
    late_bytes: int
    wasted_bytes: int
    streamed_bytes: int
    link_bytes_per_s: float


@dataclass(frozen=True)
class HintQuality:
    """How well one version predicted one layer at one lookahead in one phase; counts are over experts."""

    version: str
    layer: int
    lookahead: int
    phase: StepPhase
    hints: int
    hinted: int
    correct: int
    ready: int
    routed: int
    found: tuple[int, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts by upper bound in seconds; the last count is of what is longer than the last bound."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class HintStats:
    """What became of hints and observations, and how good the hints were."""

    taken: int
    late: int
    invalid: int
    wrong_version: int
    overflow: int
    observations_sent: int
    observations_dropped: int
    qualities: tuple[HintQuality, ...]
    latency: Histogram
    time_until_use: Histogram
    withheld: int = 0


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
    prefetch: PrefetchStats
    hints: HintStats
