"""What a replay must know about a recorded run, besides its events."""

from dataclasses import dataclass

from promoe.node_report import CacheShape, DeviceInfo, ModelInfo, ServiceInfo


@dataclass(frozen=True)
class TraceHeader:
    """Field names and meanings are those of `TraceHeader` in inference.proto.

    Attributes:
        service, model, shape, device: of the node that was recorded.
        link_bytes_per_s: what its link carried, as measured.
        began_unix_s: when the trace began, for people.
        resident: per slot the expert it held at the beginning, as layer * num_experts + expert, or -1.
        history_json: what eviction remembered at the beginning.
    """

    service: ServiceInfo
    model: ModelInfo
    shape: CacheShape
    device: DeviceInfo
    link_bytes_per_s: float
    began_unix_s: float
    resident: tuple[int, ...]
    history_json: str

    @property
    def blob_nbytes(self) -> int:
        """Bytes of one expert on the link."""
        return self.model.expert_nbytes
