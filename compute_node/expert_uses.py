"""When and how often every expert was used, in plain numbers: counted at every layer, looked at by few evictions.

Lists of numbers, not arrays: to count eight uses takes a microsecond so, and several with an array's operations.
"""

from collections.abc import Sequence
from typing import Final

from promoe.ids import ExpertId

Counts = list[list[int]]
"""By layer and expert."""

ARRAYS: Final = ("last_use", "last_touch", "num_uses", "num_routed")


class ExpertUses:
    """Owned by the engine thread.

    Attributes:
        last_use: value of the use counter when the expert was last routed (larger is later).
        last_touch: the same, but being hinted counts too.
        num_uses: times routed since it was loaded.
        num_routed: times routed since the start.
        clock: the use counter.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.last_use: Counts = [[0] * num_experts for _ in range(num_layers)]
        self.last_touch: Counts = [[0] * num_experts for _ in range(num_layers)]
        self.num_uses: Counts = [[0] * num_experts for _ in range(num_layers)]
        self.num_routed: Counts = [[0] * num_experts for _ in range(num_layers)]
        self.clock = 0

    def routed(self, layer: int, experts: Sequence[int]) -> None:
        """These experts of a layer are used, in this order."""
        last_use, last_touch = self.last_use[layer], self.last_touch[layer]
        num_uses, num_routed = self.num_uses[layer], self.num_routed[layer]
        clock = self.clock
        for expert in experts:
            clock += 1
            last_use[expert] = last_touch[expert] = clock
            num_uses[expert] += 1
            num_routed[expert] += 1
        self.clock = clock

    def touched(self, layer: int, experts: Sequence[int]) -> None:
        """A hint names them; later ones of the list count as touched earlier (ProMoE §6.1)."""
        last_touch = self.last_touch[layer]
        for expert in reversed(experts):
            self.clock += 1
            last_touch[expert] = self.clock

    def loaded(self, expert: ExpertId, is_needed: bool) -> None:
        """It comes into a slot. What nobody needed yet counts as used now, or it would be the first to go."""
        self.num_uses[expert.layer][expert.expert] = 1 if is_needed else 0
        if not is_needed:
            self.clock += 1
            self.last_use[expert.layer][expert.expert] = self.clock
            self.last_touch[expert.layer][expert.expert] = self.clock

    def to_document(self) -> dict[str, object]:
        """For a snapshot; `ExpertHistory.load_json` undoes it."""
        return {**{f"{name}_LE": getattr(self, name) for name in ARRAYS}, "clock": self.clock}
