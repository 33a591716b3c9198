"""How fast compute walks through the layers, and how busy the link is: what prefetches have to fit into."""

from typing import Final

MEMORY: Final = 0.05
"""Weight of the newest layer in the averages: about the last 20 layers count."""


class Pace:
    """Averages over the layers just computed. Owned by the engine thread; the clock is the owner's.

    Attributes:
        layer_s: compute between two layers' routings, without stalls; None before two were seen in a row.
        link_busy_share: share of looks at the link's queue that found work in it.
    """

    def __init__(self) -> None:
        self.layer_s: float | None = None
        self.link_busy_share = 0.0
        self._former: tuple[int, float] | None = None
        self._stall_s = 0.0

    def begin_step(self, changes_phase: bool) -> None:
        """The time between two steps is nobody's layer; prefill's layers say nothing about decode's."""
        self._former = None
        if changes_phase:
            self.layer_s = None

    def routed(self, layer: int, now_s: float) -> None:
        """The layer's routing became known."""
        if self._former is not None and self._former[0] == layer - 1:
            layer_s = max(0.0, now_s - self._former[1] - self._stall_s)
            self.layer_s = layer_s if self.layer_s is None else self.layer_s + MEMORY * (layer_s - self.layer_s)
        self._former = (layer, now_s)
        self._stall_s = 0.0

    def stalled(self, stall_s: float) -> None:
        """Compute waited since the routing."""
        self._stall_s += stall_s

    def looked_at_link(self, is_busy: bool) -> None:
        """One look at the link's queue."""
        self.link_busy_share += MEMORY * (is_busy - self.link_busy_share)
