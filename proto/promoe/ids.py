"""The one way to name an expert."""

from typing import NamedTuple


class ExpertId(NamedTuple):
    """One routed FFN: MoE layer (counted over MoE layers only, from 0), then expert. Printed `L3E17`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer}E{self.expert}"
