"""How often decoding misses lately: what decides how much a look ahead is worth. A sink of trace events."""

from enum import Enum
from typing import Final

from promoe.trace_events import LayerEvent, StepEvent, TraceEvent

MEMORY: Final = 1 / 128
"""Weight of the newest layer; a few steps count."""

MANY_MISSES: Final = 0.12
"""Share of accesses. Above it a second hint for a layer, made nearer to it, saves more waiting than it takes time:
at a cache rate of 0.25 without it the demo model's decode hit rate fell from .82 to .72; at 0.5, by .01."""

HARDLY_ANY: Final = 0.002
"""Below it there is nothing to save: a miss in 500 accesses."""


class MissLevel(Enum):
    """Of what decoding needs, how much is missed."""

    HARDLY_ANY = "hardly any"
    FEW = "few"
    MANY = "many"


class MissWatch:
    """Owned by the engine thread.

    Args:
        cache_rate: of the expert cache. Until some steps have shown otherwise, as many misses are expected as experts
            are absent.
    """

    def __init__(self, cache_rate: float) -> None:
        self._miss_share = 1.0 - cache_rate
        self._is_decode = False

    @property
    def level(self) -> MissLevel:
        """By the share of misses over the last steps."""
        if self._miss_share > MANY_MISSES:
            return MissLevel.MANY
        return MissLevel.FEW if self._miss_share > HARDLY_ANY else MissLevel.HARDLY_ANY

    def __call__(self, event: TraceEvent) -> None:
        """Sees every layer of steps that only decode."""
        if isinstance(event, LayerEvent):
            num_needed = len(event.hits) + len(event.misses)
            if self._is_decode and num_needed:
                self._miss_share += MEMORY * (len(event.misses) / num_needed - self._miss_share)
        elif isinstance(event, StepEvent):
            self._is_decode = not any(span.is_prefill for span in event.spans)
