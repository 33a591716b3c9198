"""The offline optimum for a recorded routing: the least loads that any eviction and admission could have needed.

Belady's MIN with bypass: after a step a layer keeps, of what it held and what it just used, the experts that are
needed again soonest. Per layer with equal slots, as the cache it is compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedStep:
    """One layer's distinct experts in one step."""

    experts: frozenset[int]
    is_decode: bool


@dataclass(frozen=True)
class HitCount:
    """Accesses of decode steps."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Hits divided by hits and misses."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: "HitCount") -> "HitCount":
        return HitCount(self.hits + other.hits, self.misses + other.misses)


def belady(steps: Sequence[RoutedStep], slots: int, resident: frozenset[int]) -> HitCount:
    """Counts one layer's decode hits under the optimum.

    Args:
        steps: in order.
        slots: of the layer.
        resident: what the layer holds before the first step.
    """
    next_use = _next_uses(steps)
    held = set(resident)
    hits = misses = 0
    for index, step in enumerate(steps):
        found = len(step.experts & held)
        if step.is_decode:
            hits += found
            misses += len(step.experts) - found
        candidates = sorted(held | step.experts, key=lambda expert: (next_use[index].get(expert, len(steps)), expert))
        held = set(candidates[:slots])
    return HitCount(hits, misses)


def _next_uses(steps: Sequence[RoutedStep]) -> list[dict[int, int]]:
    """For each step: every expert's first use after it."""
    uses: list[dict[int, int]] = [{} for _ in steps]
    soonest: dict[int, int] = {}
    for index in range(len(steps) - 1, -1, -1):
        uses[index] = dict(soonest)
        for expert in steps[index].experts:
            soonest[expert] = index
    return uses
