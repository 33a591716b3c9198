"""The newest hint for the next visit of each MoE layer. Owned by the engine thread."""

from collections.abc import Iterator
from dataclasses import dataclass

from promoe.hint import Hint
from promoe.trace_events import HintFate


@dataclass(frozen=True)
class ComingVisit:
    """A layer that will be visited, and what is hinted for it. `distance` counts layers from now, from 1 up."""

    layer: int
    distance: int
    hint: Hint


class HintBook:
    """Files hints by layer; a newer one for the same visit replaces the older, which was made from further away.

    Attributes:
        step: the running step; 0 before the first.
        layer: whose routing became known last in it; -1 at its beginning.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._hints: list[Hint | None] = [None] * num_layers
        self.step = 0
        self.layer = -1

    def begin_step(self, step: int) -> Iterator[Hint]:
        """Forgets hints for steps that are over; yields those that came early for this one."""
        self.step, self.layer = step, -1
        for layer, hint in enumerate(self._hints):
            if hint is not None and hint.step != step:
                self._hints[layer] = None
            elif hint is not None:
                yield hint

    def file(self, hint: Hint) -> HintFate:
        """Takes a hint for a visit that is still to come."""
        if hint.step < self.step or (hint.step == self.step and hint.layer <= self.layer):
            return HintFate.LATE
        if hint.step > self.step + 1 or (hint.step > self.step and hint.layer > self.layer):
            # Not for the layer's next visit, but for one after it.
            return HintFate.INVALID
        self._hints[hint.layer] = hint
        return HintFate.TAKEN

    def routed(self, layer: int) -> None:
        """The layer's visit is over; a hint for the next step is kept."""
        self.layer = layer
        hint = self._hints[layer]
        if hint is not None and hint.step <= self.step:
            self._hints[layer] = None

    def hint_for(self, layer: int) -> Hint | None:
        """The hint for the layer's next visit."""
        return self._hints[layer]

    def coming(self, max_distance: int) -> Iterator[ComingVisit]:
        """Hinted visits in the order they will happen, up to so many layers from now."""
        for distance in range(1, min(max_distance, self._num_layers) + 1):
            layer = (self.layer + distance) % self._num_layers
            hint = self._hints[layer]
            # Beyond the last layer only what is for the next step is meant, before it only what is for this one.
            if hint is not None and hint.step == self.step + (self.layer + distance) // self._num_layers:
                yield ComingVisit(layer, distance, hint)
