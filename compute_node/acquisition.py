"""One layer's use of its experts in one step."""

from dataclasses import dataclass, field

from compute_node.slots import Slot
from promoe.hint import IdArray
from promoe.trace_events import LayerEvent


@dataclass
class Acquisition:
    """What was there, what had to come, and how long compute waited.

    Iterate `ExpertCache.arrivals` once, inside `ExpertCache.acquire`.

    Attributes:
        hits: needed experts that were READY when the routing became known.
        misses: the others, in the order they are loaded.
        stall_s: time the engine thread waited for loads.
        loaded_nbytes: bytes asked from the transfer engine when the routing was known.
        late: those of `misses` whose load was under way.
        late_stall_s: the part of `stall_s` that was spent on `late`.
        ready: all experts of the layer that were READY when the routing became known, needed or not.
        pinned: slots by expert; the cache's business, as is what follows.
        waiting: absent experts that are not asked for yet.
        may_look: a look around is due as soon as compute has to wait.
    """

    layer: int
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    stall_s: float = 0.0
    loaded_nbytes: int = 0
    late: tuple[int, ...] = ()
    late_stall_s: float = 0.0
    ready: tuple[int, ...] = ()
    pinned: dict[int, Slot] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    may_look: bool = False

    def event(self, step: int, topk_ids_TK: IdArray, routed_s: float, end_s: float) -> LayerEvent:
        """What is told of it when it is over."""
        return LayerEvent(
            at_s=routed_s,
            end_s=end_s,
            step=step,
            layer=self.layer,
            topk_ids_TK=topk_ids_TK,
            hits=self.hits,
            misses=self.misses,
            late=self.late,
            stall_s=self.stall_s,
            ready=self.ready,
        )
