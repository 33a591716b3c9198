"""What a packed model looks like: element type, the layout of one expert's blob, and the model's geometry.

Knows no torch: the store reads it too.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

BLOB_ALIGNMENT_NBYTES: Final = 4096
"""Blobs start on page borders, so that O_DIRECT can read and the driver can register them."""

TENSOR_ALIGNMENT_NBYTES: Final = 64
"""Tensors inside a blob start on cache lines (and on every kernel's alignment)."""


class Dtype(Enum):
    """Element type of experts' weights; the value is safetensors' and torch's spelling."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is Dtype.FLOAT32 else 2

    @classmethod
    def parse(cls, name: str) -> "Dtype":
        """Raises ValueError naming the allowed set."""
        try:
            return cls(name)
        except ValueError:
            allowed = ", ".join(member.value for member in cls)
            raise ValueError(f"dtype is {name!r}; allowed: {allowed}") from None


def align_up(nbytes: int, alignment_nbytes: int) -> int:
    """The smallest multiple of `alignment_nbytes` that is at least `nbytes`."""
    return -(-nbytes // alignment_nbytes) * alignment_nbytes


@dataclass(frozen=True)
class TensorSlice:
    """One parameter of one expert inside its blob, for example `gate_up_proj` of shape (2F, D)."""

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExpertLayout:
    """How one expert's blob is laid out; the same for every expert of a model.

    The tensors are those of Transformers' experts module, without its leading experts dimension, in the module's
    own order, so that the experts function computes on them as they are.
    """

    dtype: Dtype
    tensors: tuple[TensorSlice, ...]

    @classmethod
    def of(cls, dtype: Dtype, shapes: dict[str, tuple[int, ...]]) -> "ExpertLayout":
        """Places tensors of these shapes (at least one) one behind the other, each on a cache line."""
        assert shapes, "an expert has at least one tensor"
        tensors: list[TensorSlice] = []
        offset = 0
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            tensors.append(TensorSlice(name, shape, offset, nbytes))
            offset = align_up(offset + nbytes, TENSOR_ALIGNMENT_NBYTES)
        return cls(dtype, tuple(tensors))

    @property
    def blob_nbytes(self) -> int:
        """Bytes of one blob, without alignment to the next."""
        last = self.tensors[-1]
        return last.offset + last.nbytes

    @property
    def blob_stride_nbytes(self) -> int:
        """Distance from one blob to the next in a pack file and in the arena."""
        return align_up(self.blob_nbytes, BLOB_ALIGNMENT_NBYTES)


@dataclass(frozen=True)
class ModelSpec:
    """The geometry both ends of a connection must agree on."""

    name: str
    family: str
    fingerprint: str
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    layout: ExpertLayout

    @property
    def num_blobs(self) -> int:
        """Experts over all MoE layers."""
        return self.num_moe_layers * self.num_experts

    @property
    def experts_nbytes(self) -> int:
        """Bytes of all experts, without alignment."""
        return self.num_blobs * self.layout.blob_nbytes
