"""The offline optimum for a recorded routing: the least loads that any eviction and admission could have needed.

Belady's MIN with bypass: after a visit the slots keep, of what they held and what was just used, the experts that are
needed again soonest; an expert that the visit itself needs may pass through without staying.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_NEVER: Final = 1 << 62


@dataclass(frozen=True)
class Visit:
    """The distinct experts that one layer needs in one step; numbered by the caller, uniquely among what competes."""

    experts: frozenset[int]
    is_decode: bool


@dataclass(frozen=True)
class HitCount:
    """Accesses of one phase."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Hits divided by hits and misses."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: "HitCount") -> "HitCount":
        return HitCount(self.hits + other.hits, self.misses + other.misses)


@dataclass(frozen=True)
class PhaseHits:
    """Prefill and decode apart, but in one history: what prefill leaves in the slots is what decode finds."""

    prefill: HitCount
    decode: HitCount

    def __add__(self, other: "PhaseHits") -> "PhaseHits":
        return PhaseHits(self.prefill + other.prefill, self.decode + other.decode)


def belady(visits: Sequence[Visit], slots: int, resident: Iterable[int]) -> PhaseHits:
    """Counts the optimum's hits of visits that share slots, in O(n log n).

    Args:
        visits: in order.
        slots: that they share.
        resident: what the slots hold before the first visit.
    """
    next_uses = _next_uses(visits)
    first_use = {expert: index for index in range(len(visits) - 1, -1, -1) for expert in visits[index].experts}
    held = {expert: first_use.get(expert, _NEVER) for expert in resident}
    assert len(held) <= slots, "the slots hold what is resident"
    # The farthest next use first; entries that `held` does not know (any more) are dead.
    farthest = [(-use, expert) for expert, use in held.items()]
    heapq.heapify(farthest)
    hits, misses = [0, 0], [0, 0]
    for visit, uses in zip(visits, next_uses, strict=True):
        found = 0
        for expert, use in uses:
            found += expert in held
            held[expert] = use
            heapq.heappush(farthest, (-use, expert))
        while len(held) > slots:
            use, expert = heapq.heappop(farthest)
            if held.get(expert) == -use:
                del held[expert]
        hits[visit.is_decode] += found
        misses[visit.is_decode] += len(uses) - found
    return PhaseHits(HitCount(hits[False], misses[False]), HitCount(hits[True], misses[True]))


def _next_uses(visits: Sequence[Visit]) -> list[list[tuple[int, int]]]:
    """For each visit: its experts, each with the index of the next visit that needs it."""
    uses: list[list[tuple[int, int]]] = []
    soonest: dict[int, int] = {}
    for index in range(len(visits) - 1, -1, -1):
        experts = visits[index].experts
        uses.append([(expert, soonest.get(expert, _NEVER)) for expert in experts])
        for expert in experts:
            soonest[expert] = index
    uses.reverse()
    return uses
