"""What a compute node says about itself, in its own nouns; the service turns them into wire messages."""

from dataclasses import dataclass
from typing import Protocol

from compute_node.engine import EngineKind
from promoe.model_spec import ModelSpec


@dataclass(frozen=True)
class DeviceReport:
    """Where the model runs.

    Attributes:
        kind: `cuda` or `cpu`.
        name: for people, for example the GPU's name.
        reason: why it was chosen, one sentence.
        link: how experts travel: `memcpy`, `emulated`, `registered` or `bounce`.
        emulated_link_bytes_per_s: set when the link is throttled to play another one.
    """

    kind: str
    name: str
    reason: str
    link: str
    emulated_link_bytes_per_s: int | None = None


@dataclass(frozen=True)
class NodeIdentity:
    """What does not change while the process lives.

    Attributes:
        instance_id: new at every start.
        model: what it serves.
        engine: which engine serves it.
        engine_reason: why, one sentence.
        device: where.
    """

    instance_id: str
    model: ModelSpec
    engine: EngineKind
    engine_reason: str
    device: DeviceReport


@dataclass(frozen=True)
class CacheShapeReport:
    """The expert cache as it was planned."""

    slots_per_layer: int
    slot_nbytes: int
    cache_rate: float
    eviction: str
    chunk_nbytes: int
    max_chunks_in_flight: int


@dataclass(frozen=True)
class StoreLinkReport:
    """The expert store behind the node; `attached` is false when it is gone and the mapped experts are served on."""

    endpoint: str
    attached: bool
    arena_uuid: str
    arena_kind: str


@dataclass(frozen=True)
class PhaseCounts:
    """Counters of one phase since the start of the process."""

    hits: int
    misses: int
    steps: int
    tokens: int
    stall_s: float
    demand_nbytes: int


@dataclass(frozen=True)
class LayerCounts:
    """One MoE layer: experts that are READY and LOADING now, and counters since the start of the process."""

    layer: int
    resident: int
    loading: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True)
class CacheCounts:
    """Counters of the expert cache and its link."""

    prefill: PhaseCounts
    decode: PhaseCounts
    layers: tuple[LayerCounts, ...]
    uploaded_nbytes: int
    link_busy_s: float


class CacheReporter(Protocol):
    """Says what the expert cache is and did. Called on the event loop: answers from memory."""

    def cache_shape(self) -> CacheShapeReport:
        """The plan."""

    def store_link(self) -> StoreLinkReport:
        """The store, as it is now."""

    def cache_counts(self) -> CacheCounts:
        """The counters, as they are now."""
