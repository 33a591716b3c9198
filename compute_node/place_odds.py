"""What a place in a hint is worth, for versions whose scores are an order and no probabilities.

Whoever budgets, ranks and evicts by hints needs probabilities. How often the expert at each place of a version's lists
was routed lately is one, whatever the scores mean. Owned by the engine thread.
"""

from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from promoe.hint import Hint

MEMORY: Final = 1 / 64
"""Weight of the newest hint: about the last 64 of a version and lookahead count, which is a few steps of all layers."""

HEAD_PRIOR: Final = 0.6
TAIL_PRIOR: Final = 0.1
"""Of the first `num_expected` places and of those behind them before there is evidence: the heads are loaded ahead, as
in ProMoE §5, and nothing else."""

MOST_KEYS: Final = 64
"""Versions come from outside, and there is no end to them; the ones known longest are forgotten."""


class OddsKey(NamedTuple):
    """What has odds of its own; `lookahead` in MoE layers."""

    version: str
    lookahead: int


class PlaceOdds:
    """Probabilities by place, of the versions that were asked about."""

    def __init__(self) -> None:
        # By place in the list, as measured; not everywhere falling.
        self._shares: dict[OddsKey, npt.NDArray[np.float64]] = {}

    def calibrated(self, key: OddsKey, hint: Hint) -> Hint:
        """The hint with a probability for each place, never rising along the list."""
        share_P = self._shares_of(key, hint)[: len(hint.experts)]
        return replace(hint, scores=np.minimum.accumulate(share_P).astype(np.float32))

    def note(self, key: OddsKey, hint: Hint, routed: set[int]) -> None:
        """The layer that the hint was for has routed to these; nothing is kept of a version that nobody asks about."""
        if key in self._shares:
            share_P = self._shares_of(key, hint)[: len(hint.experts)]
            was_routed_P = np.array([expert in routed for expert in hint.experts.tolist()], np.float64)
            share_P += MEMORY * (was_routed_P - share_P)

    def _shares_of(self, key: OddsKey, hint: Hint) -> npt.NDArray[np.float64]:
        """At least as many places as the hint has."""
        share_P = self._shares.get(key)
        if share_P is None:
            if len(self._shares) >= MOST_KEYS:
                del self._shares[next(iter(self._shares))]
            share_P = np.full(hint.num_expected, HEAD_PRIOR)
        if len(share_P) < len(hint.experts):
            share_P = np.concatenate((share_P, np.full(len(hint.experts) - len(share_P), TAIL_PRIOR)))
        self._shares[key] = share_P
        return share_P
