"""Which READY slot gives way: a policy is a row in a table.

A policy says what each expert of a layer is worth: of the slots that may be given up, the one that is worth least is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from librt.vecs import vec
from mypy_extensions import i64

from compute_node.expert_history import ExpertHistory
from promoe.config import SettingUnfit

_BETWEEN_EQUALS: Final = 2.0**-32
"""Less than one use, for the first 2^32 uses: days of decoding without a pause. Then it is a little more than that."""


@dataclass(frozen=True)
class Eviction:
    """A row of the table.

    Attributes:
        within: what the experts of a layer are worth beside each other, (E,); changes with `ExpertHistory.changes`.
        of_layer: what each of them is worth more than those of other layers, for being this layer's; may change always.
    """

    within: Callable[[ExpertHistory, int], vec[float]]
    of_layer: Callable[[ExpertHistory, int], float]


def lru(history: ExpertHistory, layer: int) -> vec[float]:
    """Keeps what was used last: the paper's baseline (ProMoE §6.1)."""
    return vec[float]([float(number) for number in history.uses.last_use[layer]])


def lfu(history: ExpertHistory, layer: int) -> vec[float]:
    """Keeps what was used most often since it was loaded; among equals what was used last."""
    pairs = zip(history.uses.num_uses[layer], history.uses.last_use[layer], strict=True)
    return vec[float]([num_uses + last_use * _BETWEEN_EQUALS for num_uses, last_use in pairs])


def static(history: ExpertHistory, layer: int) -> vec[float]:
    """Keeps what was routed most often since the start, so that the set stops changing; ties by number."""
    return vec[float]([float(number) for number in history.uses.num_routed[layer]])


def promoe(history: ExpertHistory, layer: int) -> vec[float]:
    """LRU in which being hinted counts as a use (ProMoE §5, Algorithm 2: `cache.hit` of predicted experts)."""
    return vec[float]([float(number) for number in history.uses.last_touch[layer]])


def next_use(history: ExpertHistory, layer: int) -> vec[float]:
    """Keeps what is expected to be used soonest, in layers from now: Belady's rule on estimates.

    The estimate is recency, decayed frequency, hints and the distance in layers; see `ExpertHistory`.
    """
    worth_E = history.layers_missed(layer)
    for expert in range(len(worth_E)):
        worth_E[expert] = -worth_E[expert]
    return worth_E


def _nearness(history: ExpertHistory, layer: int) -> float:
    return -float(history.layers_until_visit(layer))


def _all_alike(history: ExpertHistory, layer: int) -> float:
    return 0.0


EVICTIONS: Final[Mapping[str, Eviction]] = MappingProxyType(
    {
        "lru": Eviction(lru, _all_alike),
        "lfu": Eviction(lfu, _all_alike),
        "static": Eviction(static, _all_alike),
        "promoe": Eviction(promoe, _all_alike),
        "next_use": Eviction(next_use, _nearness),
    }
)


def eviction_named(name: str) -> Eviction:
    """Raises SettingUnfit listing the table."""
    if name not in EVICTIONS:
        raise SettingUnfit(f"compute.eviction is {name!r}; allowed: {', '.join(EVICTIONS)}")
    return EVICTIONS[name]


class WorthBy:
    """What experts are worth by a policy.

    Args:
        eviction: a row of the table.
        history: what it looks at.

    Attributes:
        changes: see `ExpertHistory`.
    """

    def __init__(self, eviction: Eviction, history: ExpertHistory) -> None:
        self._eviction = eviction
        self._history = history
        self.changes: vec[i64] = history.changes

    def within(self, layer: int) -> vec[float]:
        """Of the layer's experts beside each other, (E,)."""
        return self._eviction.within(self._history, layer)

    def of_layer(self, layer: int) -> float:
        """Of the layer beside others."""
        return self._eviction.of_layer(self._history, layer)
