"""How often decoding misses lately: what decides how much a look ahead is worth. A sink of trace events."""

from typing import Final

from promoe.trace_events import LayerEvent, StepEvent, TraceEvent

MEMORY: Final = 1 / 128
"""Weight of the newest layer: a few steps count."""

MANY_MISSES: Final = 0.12
"""Share of accesses. Above it a second hint for a layer, made nearer to it, saves more waiting than it takes time:
at a cache rate of 0.25 without it the demo model's decode hit rate fell from .82 to .72; at 0.5, by .01."""


class MissWatch:
    """Owned by the engine thread."""

    def __init__(self) -> None:
        self._miss_share = 0.0
        self._is_decode = False

    @property
    def misses_many(self) -> bool:
        """More than MANY_MISSES of what decoding needs."""
        return self._miss_share > MANY_MISSES

    def __call__(self, event: TraceEvent) -> None:
        """Sees every layer of steps that only decode."""
        if isinstance(event, LayerEvent):
            num_needed = len(event.hits) + len(event.misses)
            if self._is_decode and num_needed:
                self._miss_share += MEMORY * (len(event.misses) / num_needed - self._miss_share)
        elif isinstance(event, StepEvent):
            self._is_decode = not any(span.is_prefill for span in event.spans)
