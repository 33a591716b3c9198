"""Watches the layers of every step on the engine thread and hands samples of them to whoever wants them.

Never waits: hidden states are on their way to the host when they are handed over.
Shapes: T tokens, D hidden, K experts per token, R sampled rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from compute_node.device.seam import Device, HostCopy
from compute_node.layer_sample import LayerSample, LayerSampler, WantedSamples, sampled_rows
from promoe.hint import LayerRouting, ObservedKind, StepStart, is_observed


@dataclass(eq=False)
class _Rows:
    """The sampled rows of a step.

    Attributes:
        host_R: as numpy indexes them.
        are_all: every token of the step is sampled, and nothing is indexed.
        index_R: as the device indexes them; made when a layer is copied, on the stream that computes it: between two
            steps another stream is the current one, which nothing orders before the layers.
    """

    rows: tuple[int, ...]
    host_R: np.ndarray
    are_all: bool
    index_R: torch.Tensor | None = None


@dataclass(eq=False)
class _Watch:
    """One sampler's part in the running step."""

    sampler: LayerSampler
    wanted: WantedSamples
    rows: _Rows
    routings: list[LayerRouting] = field(default_factory=list)


class LayerObserver:
    """Told of each step, then of each layer of it in order.

    What a sampler gets of MoE layer l:

        wants                       at the layer's input            when its routing is known
        layer_input (+ routing)     hidden (+ routing of l - 1)
        router_input (+ routing)                                    hidden (+ routing of l)
        routing alone                                               routing of l

    and with `layer_input` the output of the last decoder layer (+ routing of the last MoE layer), as one layer more. Of
    layers between those that it observes it gets the routing with the next one.

    Args:
        num_layers: MoE layers.
        device: copies to the host.
        samplers: asked at every step what they want of it.
    """

    def __init__(
        self,
        num_layers: int,
        device: Device,
        samplers: Sequence[LayerSampler],
    ) -> None:
        self._num_layers = num_layers
        self._device = device
        self._samplers = tuple(samplers)
        self._start = StepStart(0, ())
        self._num_tokens = 0
        self._watches: tuple[_Watch, ...] = ()

    def begin_step(self, start: StepStart) -> None:
        """A forward pass begins; a step without tokens is nobody's."""
        self._start = start
        self._num_tokens = start.num_tokens
        rows_of: dict[int, _Rows] = {}
        watches: list[_Watch] = []
        for sampler in self._samplers:
            wanted = sampler.begin_step(start)
            if wanted is not None and self._num_tokens:
                if wanted.max_rows not in rows_of:
                    rows_of[wanted.max_rows] = self._choose_rows(wanted.max_rows)
                watches.append(_Watch(sampler, wanted, rows_of[wanted.max_rows]))
        self._watches = tuple(watches)

    def layer_input(self, layer: int, hidden_TD: torch.Tensor) -> None:
        """The decoder layer of MoE layer `layer` begins."""
        copies: dict[int, HostCopy] = {}
        for watch in self._watches:
            if watch.wanted.layer_input and is_observed(layer, self._num_layers, watch.wanted.every):
                hidden = self._copy(hidden_TD, watch.rows, copies)
                self._hand_over(watch, layer, ObservedKind.LAYER_INPUT, hidden)

    def routed(
        self, layer: int, topk_ids_TK: np.ndarray, hidden_TD: torch.Tensor, ready: tuple[int, ...] | None
    ) -> None:
        """The layer's routing is known.

        Args:
            layer: MoE layer.
            topk_ids_TK: the routing.
            hidden_TD: the layer's router input.
            ready: the layer's experts that were READY when it became known; None where nobody says.
        """
        copies: dict[int, HostCopy] = {}
        for watch in self._watches:
            wanted = watch.wanted
            if wanted.routing:
                rows = watch.rows
                seen_RK = topk_ids_TK[: self._num_tokens] if rows.are_all else topk_ids_TK[rows.host_R]
                ids_RK = seen_RK.astype(np.uint16)
                watch.routings.append(LayerRouting(layer, ids_RK, ready if wanted.ready else None))
            if not is_observed(layer, self._num_layers, wanted.every):
                continue
            if wanted.router_input:
                hidden = self._copy(hidden_TD, watch.rows, copies)
                self._hand_over(watch, layer, ObservedKind.ROUTER_INPUT, hidden)
            elif wanted.routing and not wanted.layer_input:
                self._hand_over(watch, layer, ObservedKind.NONE, None)

    def last_output(self, hidden_TD: torch.Tensor) -> None:
        """The last decoder layer's output."""
        self.layer_input(self._num_layers, hidden_TD)

    def _choose_rows(self, max_rows: int) -> _Rows:
        rows = sampled_rows(self._start.spans, max_rows)
        return _Rows(rows, np.array(rows, np.intp), len(rows) == self._num_tokens)

    def _copy(self, hidden_TD: torch.Tensor, rows: _Rows, copies: dict[int, HostCopy]) -> HostCopy:
        """One copy for all who want the same rows."""
        copy = copies.get(id(rows))
        if copy is None:
            if rows.index_R is None and not rows.are_all:
                rows.index_R = self._device.index_rows(rows.rows)
            # Rows beyond the spans are padding and belong to nobody.
            padded = rows.are_all and len(hidden_TD) > self._num_tokens
            tokens_TD = hidden_TD[: self._num_tokens] if padded else hidden_TD
            copy = copies[id(rows)] = self._device.copy_to_host(tokens_TD, rows.index_R)
        return copy

    def _hand_over(self, watch: _Watch, layer: int, kind: ObservedKind, hidden: HostCopy | None) -> None:
        routings = tuple(watch.routings)
        watch.routings.clear()
        watch.sampler.take(
            LayerSample(self._start.step, layer, kind, watch.rows.rows, self._num_tokens, hidden, routings)
        )
