"""What every expert is doing at one moment: a byte per expert, the same in the compute node and in its clients.

Shapes: L MoE layers, E experts.
"""

from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import numpy.typing as npt

StateArray = npt.NDArray[np.uint8]


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
        num_moe_layers, num_experts: L and E.
        experts: L * E bytes of ExpertBits, layer by layer.
        step: the running step, or the last one; 0 before the first.
        layer: the MoE layer that was computed last.
    """

    num_moe_layers: int
    num_experts: int
    experts: bytes
    step: int
    layer: int

    @property
    def states_LE(self) -> StateArray:
        """The bytes as a table.

        Raises:
            ValueError: there are not L * E of them.
        """
        return np.frombuffer(self.experts, dtype=np.uint8).reshape(self.num_moe_layers, self.num_experts)
