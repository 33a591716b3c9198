"""A routing that is made up, but not at random: as skewed and as persistent as a trained model's, for any geometry.

Per layer experts have a Zipf popularity in an order of the layer's own; from token to token each routed expert stays
with one probability, and what does not stay is drawn by popularity. Both parameters are fitted to two figures of a
recorded routing: how many of a token's experts the token before had, and how even the experts' use is.
Shapes: T tokens, L MoE layers, E experts, K experts per token.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

RECORDED_OVERLAP: Final = 0.41
"""Token to token, of the demo model on English text."""

RECORDED_ENTROPY: Final = 0.977
"""Of the experts' frequencies, mean over the layers, 1 for even use; likewise."""

FITTING_TOKENS: Final = 600
FITTING_LAYERS: Final = 4
FITTING_ROUNDS: Final = 2
BISECTIONS: Final = 8

IdsTLK = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoutingGeometry:
    """Sizes of a routing."""

    num_layers: int
    num_experts: int
    experts_per_token: int


@dataclass(frozen=True)
class RoutingLaw:
    """`zipf`: exponent of the popularity. `persistence`: of each routed expert, to stay for the next token."""

    zipf: float
    persistence: float


@dataclass(frozen=True)
class RoutingFigures:
    """What a routing is like. `overlap`: share of a token's experts that the token before had."""

    overlap: float
    entropy: float

    @classmethod
    def of(cls, ids_TLK: IdsTLK, num_experts: int) -> "RoutingFigures":
        """Over all tokens and layers."""
        routed_TLE = np.zeros((*ids_TLK.shape[:2], num_experts), bool)
        np.put_along_axis(routed_TLE, ids_TLK, values=True, axis=2)
        overlap = (routed_TLE[1:] & routed_TLE[:-1]).sum() / ids_TLK[1:].size
        shares_LE = routed_TLE.sum(axis=0) / routed_TLE.sum(axis=(0, 2))[:, None]
        logs_LE = np.log(shares_LE, out=np.zeros_like(shares_LE), where=shares_LE > 0)
        return cls(float(overlap), float((-(shares_LE * logs_LE).sum(axis=1) / np.log(num_experts)).mean()))


def structured_routing(geometry: RoutingGeometry, law: RoutingLaw, num_tokens: int, seed: int) -> IdsTLK:
    """(T, L, K); the layers' popularities are the same for every seed."""
    shape_LE = (geometry.num_layers, geometry.num_experts)
    ranks_LE = np.tile(np.arange(geometry.num_experts), (geometry.num_layers, 1))
    ranks_LE = np.random.default_rng(0).permuted(ranks_LE, axis=1)
    popularity_LE = -law.zipf * np.log1p(ranks_LE)
    generator = np.random.default_rng((1, seed))
    routed_LE = np.zeros(shape_LE, bool)
    ids_TLK = np.empty((num_tokens, geometry.num_layers, geometry.experts_per_token), np.int64)
    for token in range(num_tokens):
        # Gumbel's trick: the largest of log weights and noise are a draw without replacement.
        keys_LE = popularity_LE + generator.gumbel(size=shape_LE)
        keys_LE[routed_LE & (generator.random(shape_LE) < law.persistence)] = np.inf
        ids_LK = np.argpartition(-keys_LE, geometry.experts_per_token - 1, axis=1)[:, : geometry.experts_per_token]
        routed_LE[:] = False
        np.put_along_axis(routed_LE, ids_LK, values=True, axis=1)
        ids_TLK[token] = ids_LK
    return ids_TLK


def fitted_law(
    geometry: RoutingGeometry, overlap: float = RECORDED_OVERLAP, entropy: float = RECORDED_ENTROPY
) -> RoutingLaw:
    """The law whose routing has these figures, or comes as near as a routing of this geometry can."""
    few_layers = replace(geometry, num_layers=FITTING_LAYERS)

    def figures(law: RoutingLaw) -> RoutingFigures:
        return RoutingFigures.of(structured_routing(few_layers, law, FITTING_TOKENS, 0), geometry.num_experts)

    zipf, persistence = 0.5, 0.0
    for _ in range(FITTING_ROUNDS):
        low, high = 0.0, 3.0
        for _ in range(BISECTIONS):
            zipf = (low + high) / 2
            low, high = (zipf, high) if figures(RoutingLaw(zipf, persistence)).entropy > entropy else (low, zipf)
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            persistence = (low + high) / 2
            low, high = (
                (persistence, high) if figures(RoutingLaw(zipf, persistence)).overlap < overlap else (low, persistence)
            )
    return RoutingLaw(zipf, persistence)
