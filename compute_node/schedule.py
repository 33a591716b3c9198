"""Named sets of scheduling settings: what the expert cache does besides reacting. Changes latency, never tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from compute_node.load_queue import ChunkSettings
from promoe.config import SettingUnfit
from promoe.model_spec import align_up

CHUNK_ALIGNMENT_NBYTES: Final = 4096
SMALLEST_CHUNK_NBYTES: Final = 16 << 10
LARGEST_CHUNK_NBYTES: Final = 2 << 20
"""Chunks that are decided by number per expert stay between these: the smallest are all overhead, and a demand load
may wait for one."""


class SlotSplit(Enum):
    """Who may use which slot.

    LAYER: every MoE layer has an equal share. GLOBAL: all layers share all slots, and what is needed sooner takes the
    slot of what is needed later.
    """

    LAYER = "layer"
    GLOBAL = "global"


class HintUse(Enum):
    """What is done with a predictor's hints.

    TOP: the head of every hint is prefetched, layer by layer, in the order of the list (ProMoE §5). BUDGETED: ranked by
    probability and time to use; what the link cannot carry before its layer is left out.
    """

    IGNORE = "ignore"
    TOP = "top"
    BUDGETED = "budgeted"


@dataclass(frozen=True, kw_only=True)
class SchedulePolicy:
    """How slots are filled and given up.

    Attributes:
        name: of the set, for reports.
        eviction: a row of the eviction table.
        slot_split: equal shares, or one pool.
        hints: whether and how hints become prefetches.
        chunks_per_expert: a prefetch gives way to a demand load between two chunks; 1: only between experts.
        chunk_nbytes: the same in bytes; overrides it.
        largest_chunk_nbytes: for chunks that are decided by number; None: however large an expert's share is.
        chunks_demand: demand loads are cut, too.
        max_chunks_in_flight: copies handed to the link at once.
        early_preemption: all of a layer's misses become demand loads when its routing is known; else each when its
            turn to be computed comes.
        reorder: READY experts are computed first, then in order of arrival; else in the order of their ids.
        stream_prefill: in a prefill the next layers' experts are loaded in order while this one computes.
        serial: a layer is computed only when all its experts have arrived: the oracle of the overlapped loop.
    """

    name: str
    eviction: str
    slot_split: SlotSplit
    hints: HintUse
    chunks_per_expert: int
    max_chunks_in_flight: int
    early_preemption: bool
    reorder: bool
    stream_prefill: bool
    chunks_demand: bool = True
    chunk_nbytes: int | None = None
    largest_chunk_nbytes: int | None = LARGEST_CHUNK_NBYTES
    serial: bool = False

    def chunk_settings(self, blob_nbytes: int) -> ChunkSettings:
        """How experts of this size are cut."""
        chunk_nbytes = self.chunk_nbytes
        if chunk_nbytes is None and self.chunks_per_expert > 1:
            wanted_nbytes = align_up(-(-blob_nbytes // self.chunks_per_expert), CHUNK_ALIGNMENT_NBYTES)
            chunk_nbytes = max(wanted_nbytes, SMALLEST_CHUNK_NBYTES)
            if self.largest_chunk_nbytes is not None:
                chunk_nbytes = min(chunk_nbytes, self.largest_chunk_nbytes)
        return ChunkSettings(chunk_nbytes, self.max_chunks_in_flight, self.chunks_demand)


POLICIES: Final[Mapping[str, SchedulePolicy]] = MappingProxyType(
    {
        "lru": SchedulePolicy(
            name="lru",
            eviction="lru",
            slot_split=SlotSplit.LAYER,
            hints=HintUse.IGNORE,
            chunks_per_expert=1,
            max_chunks_in_flight=1,
            early_preemption=False,
            reorder=False,
            stream_prefill=False,
        ),
        # The chunks are the three matrices of an expert, whatever their size; what is urgent is not cut; one copy is
        # in flight.
        "promoe": SchedulePolicy(
            name="promoe",
            eviction="promoe",
            slot_split=SlotSplit.LAYER,
            hints=HintUse.TOP,
            chunks_per_expert=3,
            largest_chunk_nbytes=None,
            chunks_demand=False,
            max_chunks_in_flight=1,
            early_preemption=True,
            reorder=True,
            stream_prefill=False,
        ),
        "proactive": SchedulePolicy(
            name="proactive",
            eviction="next_use",
            slot_split=SlotSplit.GLOBAL,
            hints=HintUse.BUDGETED,
            chunks_per_expert=4,
            max_chunks_in_flight=2,
            early_preemption=True,
            reorder=True,
            stream_prefill=True,
        ),
    }
)
"""`lru` only reacts (the paper's baseline), `promoe` is the paper, `proactive` is ours."""


def policy_named(name: str) -> SchedulePolicy:
    """Raises SettingUnfit listing the sets."""
    if name not in POLICIES:
        raise SettingUnfit(f"compute.policy is {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]
