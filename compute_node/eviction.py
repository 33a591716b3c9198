"""Which READY slot gives way: a policy is a function and a row in the table.

A policy sees the unpinned READY slots of one layer and returns the one to evict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from promoe.config import SettingUnfit
from promoe.ids import ExpertId


@dataclass(eq=False)
class SlotHistory:
    """What policies may look at.

    Attributes:
        expert: what the slot holds.
        last_use: the cache's use counter when the expert was last acquired (larger is later).
        num_uses: acquisitions since it was loaded.
    """

    expert: ExpertId
    last_use: int = 0
    num_uses: int = 0


Eviction = Callable[[Sequence[SlotHistory]], SlotHistory]


def lru(candidates: Sequence[SlotHistory]) -> SlotHistory:
    """The least recently used one: the paper's baseline (ProMoE §6.1)."""
    return min(candidates, key=lambda slot: slot.last_use)


def lfu(candidates: Sequence[SlotHistory]) -> SlotHistory:
    """The least often used one since it was loaded; among equals the least recently used."""
    return min(candidates, key=lambda slot: (slot.num_uses, slot.last_use))


EVICTIONS: Final[Mapping[str, Eviction]] = MappingProxyType({"lru": lru, "lfu": lfu})


def eviction_named(name: str) -> Eviction:
    """Raises SettingUnfit listing the table."""
    if name not in EVICTIONS:
        raise SettingUnfit(f"compute.eviction is {name!r}; allowed: {', '.join(EVICTIONS)}")
    return EVICTIONS[name]
