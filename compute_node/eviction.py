"""Which READY slot gives way: a policy is a row in a table.

A policy scores the experts of some layers, (layers, E): of the slots that may be given up, the one with the lowest
score is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from compute_node.expert_history import ExpertHistory
from compute_node.expert_uses import as_array
from promoe.config import SettingUnfit
from promoe.ids import ExpertId

Scores: TypeAlias = npt.NDArray[np.float64] | npt.NDArray[np.int64]

_LARGEST_CLOCK: Final = 1 << 40
_MOST_USES: Final = 1 << 22
"""More uses than this, a day of decoding from one slot, count as so many: both numbers together fit 63 bits."""


@dataclass(frozen=True)
class Eviction:
    """A row of the table.

    Attributes:
        of_layers: all experts of some layers, (layers, E).
        of_expert: the same of one, to the last bit: what gives way is looked at once more, alone.
    """

    of_layers: Callable[[ExpertHistory, slice], Scores]
    of_expert: Callable[[ExpertHistory, ExpertId], float]


def lru(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was used last: the paper's baseline (ProMoE §6.1)."""
    return as_array(history.uses.last_use, layers)


def lfu(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was used most often since it was loaded; among equals what was used last."""
    uses = history.uses
    return np.minimum(as_array(uses.num_uses, layers), _MOST_USES) * _LARGEST_CLOCK + as_array(uses.last_use, layers)


def static(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what was routed most often since the start, so that the set stops changing; ties by number."""
    return as_array(history.uses.num_routed, layers)


def promoe(history: ExpertHistory, layers: slice) -> Scores:
    """LRU in which being hinted counts as a use (ProMoE §5, Algorithm 2: `cache.hit` of predicted experts)."""
    return as_array(history.uses.last_touch, layers)


def next_use(history: ExpertHistory, layers: slice) -> Scores:
    """Keeps what is expected to be used soonest, in layers from now: Belady's rule on estimates.

    The estimate is recency, decayed frequency, hints and the distance in layers; see `ExpertHistory`.
    """
    return -history.layers_until_use(layers)


def _lfu_of(history: ExpertHistory, expert: ExpertId) -> int:
    uses, (layer, number) = history.uses, expert
    return min(uses.num_uses[layer][number], _MOST_USES) * _LARGEST_CLOCK + uses.last_use[layer][number]


EVICTIONS: Final[Mapping[str, Eviction]] = MappingProxyType(
    {
        "lru": Eviction(lru, lambda history, expert: history.uses.last_use[expert.layer][expert.expert]),
        "lfu": Eviction(lfu, _lfu_of),
        "static": Eviction(static, lambda history, expert: history.uses.num_routed[expert.layer][expert.expert]),
        "promoe": Eviction(promoe, lambda history, expert: history.uses.last_touch[expert.layer][expert.expert]),
        "next_use": Eviction(next_use, lambda history, expert: -history.layers_until_use_of(expert)),
    }
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
        return self._eviction.of_layers(self._history, layers)

    def of(self, expert: ExpertId) -> float:
        """Of one expert."""
        return self._eviction.of_expert(self._history, expert)
