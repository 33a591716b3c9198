"""Batches of recorded tokens as tensors: what a network reads, and what it should have said.

The features are those of `RequestHistory`, computed for every token of a block from the tokens before it.
Shapes: S sources, L MoE layers, N tokens of a block, B tokens of a batch, D hidden, E experts, F = 3E features; T = L
and once more the first layers, those of the next token:

    t          0 .. L-1            L .. T-1
    is         this token's t      the next token's t - L
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from predictor_service.predictors.request_history import NUM_FEATURES, POPULAR, POPULARITY_DECAY, ROUTED, SIGNATURE
from predictor_service.training.token_blocks import TokenBlock

SIGNATURE_CHUNK: Final = 4096
"""Tokens whose hidden states are widened to float32 at once."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tensors of B tokens.

    Attributes:
        hidden_SBD: float32.
        routed_TBE: 1 where the expert was used.
        signature_TBE: what the layer's router made of the token (see `SignatureMap`).
        memory_TBF: what was known of the request before.
        has_next_B: False where the next token is not known: then t >= L means nothing.
        seen_SB: False where the hidden states are not known: nothing is learned from them.
        signed_TB: False where the signature is not known.
    """

    hidden_SBD: torch.Tensor
    routed_TBE: torch.Tensor
    signature_TBE: torch.Tensor
    memory_TBF: torch.Tensor
    has_next_B: torch.Tensor
    seen_SB: torch.Tensor
    signed_TB: torch.Tensor


@dataclass(frozen=True, eq=False)
class SignatureMap:
    """The routers' linear maps, centred over the experts and in units of their spread; zeros where they are unknown.

    Attributes:
        weight_LED, bias_LE: from `router_input` to the signature.
    """

    weight_LED: torch.Tensor
    bias_LE: torch.Tensor

    def of(self, hidden_LND: torch.Tensor) -> torch.Tensor:
        """(L, N, E)"""
        return torch.baddbmm(self.bias_LE[:, None], hidden_LND, self.weight_LED.transpose(1, 2))


class BlockTensors:
    """One block, ready to be drawn from.

    Args:
        block: the tokens.
        num_experts: of a layer.
        num_next: how many of the next token's first layers are wanted.
        signature: None where no signatures are wanted; they are zeros then.
    """

    def __init__(self, block: TokenBlock, num_experts: int, num_next: int, signature: SignatureMap | None) -> None:
        self._num_next = num_next
        self._hidden_SND = torch.from_numpy(block.hidden_SND.view(np.int16)).view(torch.bfloat16)
        layers, tokens, per_token = block.topk_ids_LNK.shape
        self._seen_SN = torch.from_numpy(block.known_SN)
        self._routed_LNE = torch.zeros(layers, tokens, num_experts)
        self._routed_LNE.scatter_(2, torch.from_numpy(block.topk_ids_LNK.astype(np.int64)), 1.0)
        starts_N = np.r_[True, block.document_N[1:] != block.document_N[:-1]]
        self._starts_N = torch.from_numpy(starts_N)
        self._has_next_N = torch.from_numpy(np.r_[~starts_N[1:], False])
        self._popular_LNE = torch.from_numpy(_popular_before(self._routed_LNE.numpy(), starts_N, per_token))
        self._signature_LNE = torch.zeros(layers, tokens, num_experts)
        if signature is not None:
            for first in range(0, tokens, SIGNATURE_CHUNK):
                chunk = slice(first, first + SIGNATURE_CHUNK)
                known_LN1 = self._seen_SN[:layers, chunk, None]
                self._signature_LNE[:, chunk] = signature.of(self._hidden_SND[:layers, chunk].float()) * known_LN1
        self.decode_N = torch.from_numpy(np.flatnonzero(block.is_decode_N))

    def batch(self, index_B: torch.Tensor) -> TokenBatch:
        """These tokens."""
        next_B = (index_B + 1).clamp(max=len(self._starts_N) - 1)
        return TokenBatch(
            hidden_SBD=self._hidden_SND[:, index_B].float(),
            routed_TBE=self._extended(self._routed_LNE, index_B, next_B),
            signature_TBE=self._extended(self._signature_LNE, index_B, next_B),
            memory_TBF=torch.cat([self._memory(index_B), self._memory(next_B)[: self._num_next]]),
            has_next_B=self._has_next_N[index_B],
            seen_SB=self._seen_SN[:, index_B],
            signed_TB=self._extended(self._seen_SN[: len(self._routed_LNE)], index_B, next_B),
        )

    def _extended(self, values_LNE: torch.Tensor, index_B: torch.Tensor, next_B: torch.Tensor) -> torch.Tensor:
        return torch.cat([values_LNE[:, index_B], values_LNE[: self._num_next, next_B]])

    def _memory(self, index_B: torch.Tensor) -> torch.Tensor:
        """(L, B, 3E): of the token before; unknown for a document's first."""
        before_B = (index_B - 1).clamp(min=0)
        known_B1 = (~self._starts_N[index_B]).float()[:, None]
        features: list[torch.Tensor] = [torch.empty(0)] * NUM_FEATURES
        features[ROUTED] = self._routed_LNE[:, before_B] * known_B1
        features[POPULAR] = self._popular_LNE[:, index_B]
        features[SIGNATURE] = self._signature_LNE[:, before_B] * known_B1
        return torch.cat(features, dim=2)


def _popular_before(routed_LNE: np.ndarray, starts_N: np.ndarray, experts_per_token: int) -> np.ndarray:
    layers, tokens, experts = routed_LNE.shape
    popular_LNE = np.empty((layers, tokens, experts), np.float32)
    popular_LE = np.empty((layers, experts), np.float32)
    for token in range(tokens):
        if starts_N[token]:
            popular_LE[:] = experts_per_token / experts
        popular_LNE[:, token] = popular_LE
        popular_LE *= POPULARITY_DECAY
        popular_LE += (1 - POPULARITY_DECAY) * routed_LNE[:, token]
    return popular_LNE
