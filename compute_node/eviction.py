"""Which READY slot gives way: a policy is a function and a row in the table.

A policy scores the experts of some layers, (layers, E): of the slots that may be given up, the one with the lowest
score is.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from compute_node.expert_history import ExpertHistory
from promoe.config import SettingUnfit
from promoe.ids import ExpertId

Scores: TypeAlias = npt.NDArray[np.float64] | npt.NDArray[np.int64]
Eviction: TypeAlias = Callable[[ExpertHistory, slice], Scores]

_MOST_USES: Final = 1 << 40


def lru(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was used last: the paper's baseline (ProMoE §6.1)."""
    return history.last_use_LE[layers]


def lfu(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was used most often since it was loaded; among equals what was used last."""
    return history.num_uses_LE[layers] * _MOST_USES + history.last_use_LE[layers]


def static(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was routed most often since the start, so that the set stops changing; ties by number."""
    return history.num_routed_LE[layers]


def promoe(history: ExpertHistory, layers: slice) -> Scores:
    """LRU in which being hinted counts as a use (ProMoE §5, Algorithm 2: `cache.hit` of predicted experts)."""
    return history.last_touch_LE[layers]


def next_use(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what is expected to be used soonest, in layers from now: Belady's rule on estimates.

    The estimate is recency, decayed frequency, hints and the distance in layers; see `ExpertHistory`.
    """
    return -history.layers_until_use(layers)


EVICTIONS: Final[Mapping[str, Eviction]] = MappingProxyType(
    {"lru": lru, "lfu": lfu, "static": static, "promoe": promoe, "next_use": next_use}
)


def eviction_named(name: str) -> Eviction:
    """Raises SettingUnfit listing the table."""
    if name not in EVICTIONS:
        raise SettingUnfit(f"compute.eviction is {name!r}; allowed: {', '.join(EVICTIONS)}")
    return EVICTIONS[name]


class ScoresBy:
    """A policy's scores.

    Args:
        eviction: a row of the table.
        history: what it looks at.
    """

    def __init__(self, eviction: Eviction, history: ExpertHistory) -> None:
        self._eviction = eviction
        self._history = history

    @property
    def epoch(self) -> int:
        """Changes whenever scores may have, but for those of experts that are hinted or being loaded."""
        return self._history.epoch

    def __call__(self, layers: slice) -> Scores:
        """Of the experts of these layers, (layers, E)."""
        return self._eviction(self._history, layers)

    def of(self, expert: ExpertId) -> float:
        """Of one expert."""
        score: float = self._eviction(self._history, slice(expert.layer, expert.layer + 1)).item(0, expert.expert)
        return score
