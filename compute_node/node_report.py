"""What a compute node says about itself, in the contract's dataclasses; the service turns them into wire messages."""

from dataclasses import dataclass
from typing import Protocol

from compute_node.engine import EngineKind
from promoe.cache_map import CacheMap
from promoe.model_spec import ModelSpec
from promoe.node_report import CacheShape, CacheStats, DeviceInfo, PredictorLink, StoreLink


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
    device: DeviceInfo


class CacheReporter(Protocol):
    """Says what the expert cache is and did. Called on the event loop: answers from memory."""

    def cache_shape(self) -> CacheShape:
        """The plan and the policy."""

    def store_link(self) -> StoreLink:
        """The store, as it is now."""

    def predictor_link(self) -> PredictorLink:
        """The predictor, as it is now."""

    def cache_stats(self, running_requests: int, queued_requests: int) -> CacheStats:
        """The counters, as they are now."""

    def cache_map(self) -> CacheMap:
        """What every expert is doing now."""


@dataclass(frozen=True)
class NodeReport:
    """Whom to ask about a node: what stays, and what changes."""

    identity: NodeIdentity
    reporter: CacheReporter
