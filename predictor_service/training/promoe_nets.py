"""The networks of `promoe`, all pairs' at once; inputs as they are.

The paper's objective is L1 on the multi-hot routing. Cross-entropy is beside it, in ProMoE's favour: L1's optimum is 0
for every expert that is used less than half of the time, and narrow networks get stuck there.

Shapes: N pairs, L MoE layers, B tokens, D hidden, H hidden units, E experts, T see TokenBatch.
"""

import torch
from torch import nn

from predictor_service.artifact import Artifact
from predictor_service.predictors.promoe import layer_pairs
from predictor_service.training.token_batch import TokenBatch
from predictor_service.training.trainee import CROSS_ENTROPY, Geometry, Scored
from promoe.hint import Float32Array


class PromoeNets(nn.Module):
    """See `predictor_service.predictors.promoe`; arXiv 2410.22134, section 4.3.

    Args:
        geometry: of the model.
        lookahead: of every pair but those of the last output.
        hidden_units: H.
        objective: L1 or CROSS_ENTROPY.
    """

    def __init__(self, geometry: Geometry, lookahead: int, hidden_units: int, objective: str) -> None:
        super().__init__()
        self._objective = objective
        layers, experts, hidden = geometry.num_moe_layers, geometry.num_experts, geometry.hidden_size
        pairs = layer_pairs(layers, lookahead)
        self._source_N = torch.tensor([pair.source for pair in pairs])
        # From the last output the next token's layers are predicted: behind this token's layers in T.
        self._target_N = torch.tensor([pair.source + pair.lookahead for pair in pairs])
        self._is_next_N = self._source_N == layers
        num_pairs = len(pairs)
        self._in_weight_NHD = nn.Parameter(torch.empty(num_pairs, hidden_units, hidden).uniform_(-1, 1) / hidden**0.5)
        self._in_bias_NH = nn.Parameter(torch.empty(num_pairs, hidden_units).uniform_(-1, 1) / hidden**0.5)
        bound = hidden_units**-0.5
        self._out_weight_NEH = nn.Parameter(torch.empty(num_pairs, experts, hidden_units).uniform_(-1, 1) * bound)
        self._out_bias_NE = nn.Parameter(torch.empty(num_pairs, experts).uniform_(-1, 1) * bound)

    def scored(self, batch: TokenBatch) -> Scored:
        """Scores of all pairs; the pair takes the place of the source, and there is one lookahead."""
        units_NBH = torch.baddbmm(
            self._in_bias_NH[:, None], batch.hidden_SBD[self._source_N], self._in_weight_NHD.transpose(1, 2)
        ).relu()
        scores_NBE = torch.baddbmm(self._out_bias_NE[:, None], units_NBH, self._out_weight_NEH.transpose(1, 2))
        valid_NB = (~self._is_next_N[:, None] | batch.has_next_B) & batch.seen_SB[self._source_N]
        return Scored(scores_NBE[:, None], batch.routed_TBE[self._target_N][:, None], valid_NB[:, None])

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """A mean over what is valid."""
        scored = self.scored(batch)
        if self._objective == CROSS_ENTROPY:
            error_NABE = nn.functional.binary_cross_entropy_with_logits(
                scored.scores_PABE, scored.routed_PABE, reduction="none"
            )
        else:
            error_NABE = (scored.scores_PABE - scored.routed_PABE).abs()
        error_NAB = error_NABE.mean(dim=3)
        valid_NAB = scored.valid_PAB.float()
        return (error_NAB * valid_NAB).sum() / valid_NAB.sum().clamp(min=1)

    def restore(self, artifact: Artifact) -> None:
        """Begins from an artifact's weights; raises InvalidInput if it lacks some."""
        own = self.tensors()
        found = {name: torch.from_numpy(artifact.tensor(name, values.shape)) for name, values in own.items()}
        with torch.no_grad():
            self._in_weight_NHD.copy_(found["in.weight"])
            self._in_bias_NH.copy_(found["in.bias"])
            self._out_weight_NEH.copy_(found["out.weight"])
            self._out_bias_NE.copy_(found["out.bias"])

    def tensors(self) -> dict[str, Float32Array]:
        """The artifact's."""
        return {
            "in.weight": self._in_weight_NHD.detach().numpy(),
            "in.bias": self._in_bias_NH.detach().numpy(),
            "out.weight": self._out_weight_NEH.detach().numpy(),
            "out.bias": self._out_bias_NE.detach().numpy(),
        }
