"""What every expert is doing now, for live views: the routing of each layer's last step over the state of the slots.

Told by the engine thread, asked by the event loop; nobody locks, because each layer's entry is replaced as a whole.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from promoe.cache_map import CacheMap, ExpertBit
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent

StateArray: TypeAlias = npt.NDArray[np.uint8]

_HIT: Final = np.uint8(ExpertBit.ROUTED)
_MISS: Final = np.uint8(ExpertBit.ROUTED | ExpertBit.MISSED)


class CacheMapRecorder:
    """A sink of trace events that remembers each layer's last routing.

    Args:
        num_layers: MoE layers.
        num_experts: of each.
        resident_states: (L, E) with RESIDENT, LOADING and HINTED of every expert as it is now.
    """

    def __init__(self, num_layers: int, num_experts: int, resident_states: Callable[[], StateArray]) -> None:
        self._num_experts = num_experts
        self._resident_states = resident_states
        self._step = 0
        self._layer = 0
        self._accesses: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())] * num_layers

    def __call__(self, event: TraceEvent) -> None:
        """On the engine thread, once a layer: it only keeps what it is given."""
        if isinstance(event, LayerEvent):
            self._accesses[event.layer] = (event.hits, event.misses)
            self._layer = event.layer
        elif isinstance(event, StepEvent):
            self._step = event.step

    def snapshot(self) -> CacheMap:
        """The map as it is now; from any thread."""
        states_LE = np.zeros((len(self._accesses), self._num_experts), np.uint8)
        states_LE |= self._resident_states()
        for layer, (hits, misses) in enumerate(self._accesses):
            states_LE[layer, list(hits)] |= _HIT
            states_LE[layer, list(misses)] |= _MISS
        return CacheMap(len(self._accesses), self._num_experts, states_LE.tobytes(), self._step, self._layer)
