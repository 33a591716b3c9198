"""One slot seen as the parameters of one expert."""

from typing import Final

import torch

from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype, ExpertLayout

TORCH_DTYPES: Final = {
    Dtype.FLOAT32: torch.float32,
    Dtype.FLOAT16: torch.float16,
    Dtype.BFLOAT16: torch.bfloat16,
}

SMALL_MATRIX_ELEMENTS: Final = 1 << 16
"""Half-precision matrices of this size and below are computed in float32 on a CPU: a product of a few rows costs
oneDNN 23 us in bf16 whatever its size, and 4 us in float32 after 5 us of widening (see DECISIONS.md)."""


class ExpertWeights:
    """Typed views into one blob, named as in the Transformers experts module without its experts dimension.

    Shapes, with D hidden and F expert hidden: `up` is (2F, D) gated or (F, D), `down` is (D, F); transposed modules
    have them the other way round. Biases are (2F,) or (F,) and (D,), or None. `compute_dtype` is what to compute in.
    """

    __slots__ = ("compute_dtype", "down", "down_bias", "up", "up_bias")

    def __init__(self, blob_B: torch.Tensor, layout: ExpertLayout) -> None:
        dtype = TORCH_DTYPES[layout.dtype]
        tensors = {
            part.name: blob_B[part.offset : part.offset + part.nbytes].view(dtype).view(part.shape)
            for part in layout.tensors
        }
        self.up = tensors["gate_up_proj"] if "gate_up_proj" in tensors else tensors["up_proj"]
        self.up_bias = tensors.get("gate_up_proj_bias", tensors.get("up_proj_bias"))
        self.down = tensors["down_proj"]
        self.down_bias = tensors.get("down_proj_bias")
        is_small = max(self.up.numel(), self.down.numel()) <= SMALL_MATRIX_ELEMENTS
        self.compute_dtype = torch.float32 if is_small and blob_B.device.type == "cpu" else dtype


SUPPORTED_TENSORS: Final = frozenset(
    {"gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj", "down_proj_bias"}
)


def check_layout(layout: ExpertLayout) -> None:
    """Raises ModelUnsupported when an expert has parameters that would be ignored, or lacks one that is needed."""
    names = {part.name for part in layout.tensors}
    unknown = names - SUPPORTED_TENSORS
    if unknown or "down_proj" not in names or not names & {"gate_up_proj", "up_proj"}:
        raise ModelUnsupported(
            f"An expert of this pack has the parameters {', '.join(sorted(names))}; the experts function computes with "
            f"{', '.join(sorted(SUPPORTED_TENSORS))}."
        )
