"""Whether prefetching for a layer saves more than it costs, from what became of the prefetches before."""

from typing import Final

MEMORY: Final = 1 / 64
"""Weight of the newest prefetch: about the last 64 of a layer count."""

FEWEST_PREFETCHES: Final = 32
"""Nothing is switched off on less evidence."""

REST_VISITS: Final = 64
"""Visits of the layer until it is tried again."""

LATE_GAIN: Final = 0.5
"""A prefetch that was under way when its expert was needed saved a part of the wait."""


class PrefetchWorth:
    """A switch per layer.

    One useful prefetch saves one load's wait. A wasted one costs link time, which is worth as much only while the link
    has other work to do.
    """

    def __init__(self, num_layers: int) -> None:
        self._gain = [1.0] * num_layers
        self._cost = [0.0] * num_layers
        self._seen = [0] * num_layers
        self._rest = [0] * num_layers

    def is_on(self, layer: int) -> bool:
        """Whether to prefetch for this layer."""
        return self._rest[layer] == 0

    def visited(self, layer: int) -> None:
        """One step of a switched-off layer passes."""
        if self._rest[layer]:
            self._rest[layer] -= 1
            if self._rest[layer] == 0:
                self._gain[layer], self._cost[layer], self._seen[layer] = 1.0, 0.0, 0

    def gained(self, layer: int, is_late: bool) -> None:
        """A prefetched expert was needed."""
        self._note(layer, LATE_GAIN if is_late else 1.0, 0.0)

    def wasted(self, layer: int, moved_share: float, link_busy_share: float) -> None:
        """A prefetched expert was given up unused, after `moved_share` of it had been moved."""
        self._note(layer, 0.0, moved_share * link_busy_share)

    def _note(self, layer: int, gain: float, cost: float) -> None:
        self._gain[layer] += MEMORY * (gain - self._gain[layer])
        self._cost[layer] += MEMORY * (cost - self._cost[layer])
        self._seen[layer] += 1
        if self._seen[layer] >= FEWEST_PREFETCHES and self._cost[layer] > self._gain[layer]:
            self._rest[layer] = REST_VISITS
