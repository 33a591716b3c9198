"""The networks of `learned`, all layers' at once, and how they become its artifact.

Shapes: L MoE layers, B tokens, D hidden, H trunk units, A lookaheads, E experts, F = 3E features, T see TokenBatch.
"""

import numpy as np
import torch
from torch import nn

from predictor_service.artifact import Artifact
from predictor_service.predictors.request_history import NUM_FEATURES
from predictor_service.training.token_batch import SignatureMap, TokenBatch
from predictor_service.training.trainee import Geometry, Scored
from promoe.hint import Float32Array

SOFT_WIDTH = 0.15
"""How soft the border between chosen and not chosen is, in units of the signature's spread."""


class LearnedNets(nn.Module):
    """See `predictor_service.predictors.learned`.

    Half of the target is the routing, half how far inside or outside of it the expert was: an expert just outside is
    almost as right as one just inside, and knowing so teaches more per token (recall@8 +.6 points, and calibration).

    Args:
        geometry: of the model.
        lookaheads: in MoE layers.
        trunk_units: H.
        signature: of the routers; None where they are unknown: then targets are the routing alone.
        input_LD: mean and standard deviation of each input, (2, L, D).
    """

    def __init__(
        self,
        geometry: Geometry,
        lookaheads: tuple[int, ...],
        trunk_units: int,
        signature: SignatureMap | None,
        input_2LD: torch.Tensor,
    ) -> None:
        super().__init__()
        layers, experts, hidden = geometry.num_moe_layers, geometry.num_experts, geometry.hidden_size
        self.geometry, self.lookaheads, self.trunk_units, self.signature = geometry, lookaheads, trunk_units, signature
        self._mean_LD, self._scale_LD = input_2LD[0], 1 / (input_2LD[1] + 1e-3)
        self._in_weight_LHD = nn.Parameter(torch.empty(layers, trunk_units, hidden).uniform_(-1, 1) / hidden**0.5)
        self._in_bias_LH = nn.Parameter(torch.zeros(layers, trunk_units))
        num_out, num_read = len(lookaheads) * experts, trunk_units + experts
        self._out_weight_LOO = nn.Parameter(torch.empty(layers, num_out, num_read).uniform_(-1, 1) / num_read**0.5)
        share = geometry.experts_per_token / experts
        self._out_bias_LO = nn.Parameter(torch.full((layers, num_out), float(np.log(share / (1 - share)))))
        self._memory_LAFE = nn.Parameter(torch.zeros(layers, len(lookaheads), NUM_FEATURES * experts, experts))
        self._target_LA = torch.arange(layers)[:, None] + torch.tensor(lookaheads)[None]

    def scored(self, batch: TokenBatch) -> Scored:
        """Logits of all layers and lookaheads."""
        layers, experts = self.geometry.num_moe_layers, self.geometry.num_experts
        num_tokens = batch.hidden_SBD.shape[1]
        hidden_LBD = batch.hidden_SBD[:layers]
        units_LBH = torch.baddbmm(
            self._in_bias_LH[:, None],
            (hidden_LBD - self._mean_LD[:, None]) * self._scale_LD[:, None],
            self._in_weight_LHD.transpose(1, 2),
        ).relu()
        read_LBO = torch.cat([units_LBH, batch.signature_TBE[:layers]], dim=2)
        out_LBO = torch.baddbmm(self._out_bias_LO[:, None], read_LBO, self._out_weight_LOO.transpose(1, 2))
        logits_LABE = out_LBO.view(layers, num_tokens, -1, experts).transpose(1, 2)
        logits_LABE = logits_LABE + batch.memory_TBF[self._target_LA] @ self._memory_LAFE
        is_here_LA1 = (self._target_LA < layers)[:, :, None]
        valid_LAB = (is_here_LA1 | batch.has_next_B) & batch.seen_SB[:layers, None]
        return Scored(logits_LABE, batch.routed_TBE[self._target_LA], valid_LAB)

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """Mean cross-entropy."""
        scored = self.scored(batch)
        target_LABE = scored.routed_PABE
        if self.signature is not None:
            soft_LABE = self._soft(batch.signature_TBE)[self._target_LA]
            signed_LAB1 = batch.signed_TB[self._target_LA][..., None]
            target_LABE = torch.where(signed_LAB1, (target_LABE + soft_LABE) / 2, target_LABE)
        loss_LABE = nn.functional.binary_cross_entropy_with_logits(scored.scores_PABE, target_LABE, reduction="none")
        valid_LAB = scored.valid_PAB.float()
        return (loss_LABE.mean(dim=3) * valid_LAB).sum() / valid_LAB.sum().clamp(min=1)

    def tensors(self) -> dict[str, Float32Array]:
        """The artifact's, with the input's normalisation folded into the first matrix."""
        geometry = self.geometry
        with torch.no_grad():
            weight_LHD = self._in_weight_LHD * self._scale_LD[:, None]
            bias_LH = self._in_bias_LH - (weight_LHD @ self._mean_LD[:, :, None])[:, :, 0]
            shape = (geometry.num_moe_layers, geometry.num_experts)
            signature = self.signature or SignatureMap(torch.zeros(*shape, geometry.hidden_size), torch.zeros(shape))
            in_weight_LOD = torch.cat([weight_LHD, signature.weight_LED], dim=1)
            in_bias_LO = torch.cat([bias_LH, signature.bias_LE], dim=1)
            out_bias_LAE = self._out_bias_LO.reshape(geometry.num_moe_layers, len(self.lookaheads), -1)
            return {
                "in.weight": in_weight_LOD.numpy(),
                "in.bias": in_bias_LO.numpy(),
                "out.weight": self._out_weight_LOO.detach().numpy(),
                "out.bias": out_bias_LAE.detach().numpy(),
                "memory.weight": self._memory_LAFE.detach().numpy(),
            }

    def restore(self, artifact: Artifact) -> None:
        """Begins from an artifact's weights, with this data's normalisation; raises InvalidInput if it lacks some."""
        geometry, units = self.geometry, self.trunk_units
        layers, experts, num_heads = geometry.num_moe_layers, geometry.num_experts, len(self.lookaheads)
        weight_LOD = artifact.tensor("in.weight", (layers, units + experts, geometry.hidden_size))
        bias_LO = artifact.tensor("in.bias", (layers, units + experts))
        out_LOO = artifact.tensor("out.weight", (layers, num_heads * experts, units + experts))
        out_bias_LAE = artifact.tensor("out.bias", (layers, num_heads, experts))
        memory_LAFE = artifact.tensor("memory.weight", (layers, num_heads, NUM_FEATURES * experts, experts))
        with torch.no_grad():
            weight_LHD = torch.from_numpy(weight_LOD[:, :units])
            mean_LH = (weight_LHD @ self._mean_LD[:, :, None])[:, :, 0]
            self._in_weight_LHD.copy_(weight_LHD / self._scale_LD[:, None])
            self._in_bias_LH.copy_(torch.from_numpy(bias_LO[:, :units]) + mean_LH)
            self._out_weight_LOO.copy_(torch.from_numpy(out_LOO))
            self._out_bias_LO.copy_(torch.from_numpy(out_bias_LAE).reshape(layers, -1))
            self._memory_LAFE.copy_(torch.from_numpy(memory_LAFE))

    def _soft(self, signature_TBE: torch.Tensor) -> torch.Tensor:
        chosen = self.geometry.experts_per_token
        largest_TBK = signature_TBE.topk(chosen + 1, dim=2).values
        border_TB1 = (largest_TBK[:, :, chosen - 1 : chosen] + largest_TBK[:, :, chosen:]) / 2
        return torch.sigmoid((signature_TBE - border_TB1) / SOFT_WIDTH)
