"""What a link carried."""

from collections.abc import Mapping
from dataclasses import dataclass

from promoe.trace_events import LoadReason


@dataclass(frozen=True)
class TransferStats:
    """Since the start. `nbytes_by_reason`: by what a chunk's load was queued as when it was copied."""

    uploaded_nbytes: int
    link_busy_s: float
    nbytes_by_reason: Mapping[LoadReason, int]
