"""The ablation's steps: from reactive LRU to ProMoE, part by part, and from ProMoE to ours."""

from dataclasses import dataclass, replace
from typing import Final

from compute_node.schedule import POLICIES, HintUse, SchedulePolicy, SlotSplit

PROMOE_PREDICTOR: Final = "promoe"
OUR_PREDICTOR: Final = "learned"

BASE: Final = "LRU"
PROMOE: Final = "+ reorder = ProMoE"
OURS: Final = "+ layer streaming = promoe"


@dataclass(frozen=True)
class Variant:
    """One row of the table. `predictor`: whose hints it takes; None for none."""

    name: str
    policy: SchedulePolicy
    predictor: str | None


def variants() -> tuple[Variant, ...]:
    """Cumulative: each row has everything of the row before it."""
    lru, promoe, ours = POLICIES["lru"], POLICIES["promoe"], POLICIES["proactive"]
    prefetch = replace(lru, hints=HintUse.TOP, eviction=promoe.eviction)
    chunks = replace(
        prefetch,
        chunks_per_expert=promoe.chunks_per_expert,
        largest_chunk_nbytes=promoe.largest_chunk_nbytes,
        chunks_demand=promoe.chunks_demand,
    )
    preemption = replace(chunks, early_preemption=True)
    reorder = replace(preemption, reorder=True)
    assert replace(reorder, name=promoe.name) == promoe, "the steps from LRU lead to ProMoE"
    eviction = replace(reorder, eviction=ours.eviction, slot_split=SlotSplit.GLOBAL)
    budget = replace(
        eviction,
        hints=HintUse.BUDGETED,
        chunks_per_expert=ours.chunks_per_expert,
        largest_chunk_nbytes=ours.largest_chunk_nbytes,
        chunks_demand=ours.chunks_demand,
        max_chunks_in_flight=ours.max_chunks_in_flight,
    )
    streaming = replace(budget, stream_prefill=True)
    assert replace(streaming, name=ours.name) == ours, "the steps from ProMoE lead to ours"
    return (
        Variant(BASE, lru, None),
        Variant("+ prefetch", prefetch, PROMOE_PREDICTOR),
        Variant("+ chunks", chunks, PROMOE_PREDICTOR),
        Variant("+ early preemption", preemption, PROMOE_PREDICTOR),
        Variant(PROMOE, promoe, PROMOE_PREDICTOR),
        Variant("+ our eviction", eviction, PROMOE_PREDICTOR),
        Variant("+ budgeted hints", budget, OUR_PREDICTOR),
        Variant(OURS, ours, OUR_PREDICTOR),
    )
