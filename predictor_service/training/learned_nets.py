"""The networks of `learned`, all layers' at once, and how they become its artifact.

Shapes: L MoE layers, V of them shown, B tokens, D hidden, H trunk units, A lookaheads, E experts, F = 3E features, T
see TokenBatch.
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
        """Logits of all layers and lookaheads, but of no layer whose hidden states are unknown of every token."""
        return self._scored(batch, self._shown(batch))

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """Mean cross-entropy."""
        shown_V = self._shown(batch)
        scored = self._scored(batch, shown_V)
        target_VA, target_VABE = self._target_LA[shown_V], scored.routed_PABE
        if self.signature is not None:
            soft_VABE = self._soft(batch.signature_TBE)[target_VA]
            signed_VAB1 = batch.signed_TB[target_VA][..., None]
            target_VABE = torch.where(signed_VAB1, (target_VABE + soft_VABE) / 2, target_VABE)
        loss_VABE = nn.functional.binary_cross_entropy_with_logits(scored.scores_PABE, target_VABE, reduction="none")
        valid_VAB = scored.valid_PAB.float()
        return (loss_VABE.mean(dim=3) * valid_VAB).sum() / valid_VAB.sum().clamp(min=1)

    def _shown(self, batch: TokenBatch) -> torch.Tensor | slice:
        """The layers that something can be learned of: what serves with two lookaheads is shown every second one."""
        shown_L = batch.seen_SB[: self.geometry.num_moe_layers].any(dim=1)
        return slice(None) if bool(shown_L.all()) else shown_L.nonzero()[:, 0]

    def _scored(self, batch: TokenBatch, shown_V: torch.Tensor | slice) -> Scored:
        layers, experts = self.geometry.num_moe_layers, self.geometry.num_experts
        num_tokens = batch.hidden_SBD.shape[1]
        hidden_VBD = batch.hidden_SBD[:layers][shown_V]
        units_VBH = torch.baddbmm(
            self._in_bias_LH[shown_V, None],
            (hidden_VBD - self._mean_LD[shown_V, None]) * self._scale_LD[shown_V, None],
            self._in_weight_LHD[shown_V].transpose(1, 2),
        ).relu()
        read_VBO = torch.cat([units_VBH, batch.signature_TBE[:layers][shown_V]], dim=2)
        out_weight_VOO = self._out_weight_LOO[shown_V]
        out_VBO = torch.baddbmm(self._out_bias_LO[shown_V, None], read_VBO, out_weight_VOO.transpose(1, 2))
        target_VA = self._target_LA[shown_V]
        logits_VABE = out_VBO.view(len(target_VA), num_tokens, len(self.lookaheads), experts).transpose(1, 2)
        logits_VABE = logits_VABE + batch.memory_TBF[target_VA] @ self._memory_LAFE[shown_V]
        is_here_VA1 = (target_VA < layers)[:, :, None]
        valid_VAB = (is_here_VA1 | batch.has_next_B) & batch.seen_SB[:layers][shown_V, None]
        return Scored(logits_VABE, batch.routed_TBE[target_VA], valid_VAB)

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
