"""What training knows of the networks it trains."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from predictor_service.artifact import Artifact
from predictor_service.training.token_batch import TokenBatch
from promoe.hint import Float32Array

L1: Final = "l1"
CROSS_ENTROPY: Final = "cross_entropy"


@dataclass(frozen=True)
class Geometry:
    """Of the model whose routing is learned."""

    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int


@dataclass(frozen=True, eq=False)
class Scored:
    """Predictions of a batch beside the truth. Shapes: P sources, A lookaheads, B tokens, E experts."""

    scores_PABE: torch.Tensor
    routed_PABE: torch.Tensor
    valid_PAB: torch.Tensor


class Trainee(Protocol):
    """Networks of one kind of predictor."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What is trained."""

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """A scalar."""

    def scored(self, batch: TokenBatch) -> Scored:
        """To measure recall."""

    def tensors(self) -> dict[str, Float32Array]:
        """The artifact's."""

    def restore(self, artifact: Artifact) -> None:
        """Begins from an artifact's weights; raises InvalidInput if it lacks some."""
