"""What every expert is doing at one moment: a byte per expert, the same in the compute node and in its clients."""

from dataclasses import dataclass
from enum import IntFlag


class ExpertBit(IntFlag):
    """Bits of `CacheMapResponse.experts`; ROUTED and MISSED are of the layer's last step."""

    RESIDENT = 1
    LOADING = 2
    HINTED = 4
    ROUTED = 8
    MISSED = 16


@dataclass(frozen=True)
class CacheMap:
    """Answer of CacheMap.

    Attributes:
        num_moe_layers, num_experts: how many layers, and experts of each.
        experts: ExpertBits, a byte for every expert, layer by layer.
        step: the running step, or the last one; 0 before the first.
        layer: the MoE layer that was computed last.
    """

    num_moe_layers: int
    num_experts: int
    experts: bytes
    step: int
    layer: int

    @property
    def by_layer(self) -> tuple[bytes, ...]:
        """The experts' bytes of each layer.

        Raises:
            ValueError: there are more or fewer than it says.
        """
        if len(self.experts) != self.num_moe_layers * self.num_experts:
            raise ValueError(
                f"the cache map has {len(self.experts)} bytes; expected {self.num_moe_layers} layers × "
                f"{self.num_experts} experts"
            )
        starts = range(0, len(self.experts), self.num_experts)
        return tuple(self.experts[start : start + self.num_experts] for start in starts)
