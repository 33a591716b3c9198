"""How long a step computes with all experts resident: an estimate from the bytes that it reads, no measurement.

Decoding is bound by memory: every dense weight is read once a step, and every distinct expert that a layer routes to.
What a program costs beside its bytes is an allowance per layer, known from one model on one CPU and assumed for GPUs.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

LAYER_OVERHEAD_S: Final = MappingProxyType({"cpu": 3e-3, "cuda": 0.5e-3})
"""Of the estimate's upper end. CPU: the demo model, 94 ms a token where its bytes take 21 ms, over 30 layers (AMD EPYC,
one thread, raw in tests/bench/results/ablation.json). CUDA: assumed, for launching a layer's kernels from Python."""


@dataclass(frozen=True)
class ComputeCost:
    """What one step of a model costs.

    Attributes:
        num_layers: MoE layers, over which everything else is spread.
        dense_nbytes: read once a step.
        blob_nbytes: of an expert.
        kv_nbytes: read once a step, over all requests.
        bytes_per_s: of the device's memory.
        layer_s: beside the bytes, for every MoE layer.
    """

    num_layers: int
    dense_nbytes: int
    blob_nbytes: int
    kv_nbytes: int
    bytes_per_s: float
    layer_s: float = 0.0

    @property
    def lead_s(self) -> float:
        """Of one layer, before its routing is known."""
        return self.layer_s + (self.dense_nbytes + self.kv_nbytes) / self.num_layers / self.bytes_per_s

    def experts_s(self, num_distinct: int) -> float:
        """Of so many experts of one layer."""
        return num_distinct * self.blob_nbytes / self.bytes_per_s

    def step_s(self, num_distinct: float) -> float:
        """Of a step whose layers need so many experts on average."""
        return self.num_layers * (self.lead_s + num_distinct * self.blob_nbytes / self.bytes_per_s)

    def scaled_to(self, step_s: float, num_distinct: float) -> "ComputeCost":
        """The same shares, but so long altogether."""
        factor = step_s / self.step_s(num_distinct)
        return ComputeCost(
            self.num_layers,
            self.dense_nbytes,
            self.blob_nbytes,
            self.kv_nbytes,
            self.bytes_per_s / factor,
            self.layer_s * factor,
        )
