"""A bounded sample of a step's tokens: which ones, and what one MoE layer saw of them.

Samplers are the predictor's client and the trace recorder. Shapes: T tokens, R sampled rows, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from compute_node.device.seam import HostCopy
from promoe.hint import LayerRouting, ObservedKind, StepSpan, StepStart


@dataclass(frozen=True)
class WantedSamples:
    """What a sampler wants to see of a step.

    Attributes:
        max_rows: at most so many tokens, at least one.
        layer_input: the residual stream entering each MoE decoder layer, and what leaves the last decoder layer.
        router_input: what the experts function gets as hidden states.
        routing: the rows' routed experts.
        every: see `is_observed`; the routings of layers in between come with the next sample.
        ready: with each routing, which of the layer's experts were READY then.
    """

    max_rows: int
    layer_input: bool
    router_input: bool
    routing: bool
    every: int = 1
    ready: bool = False


@dataclass(frozen=True, eq=False)
class LayerSample:
    """What one MoE layer saw in one step; its hidden states may still be on their way to the host.

    Attributes:
        step: counts up.
        layer: MoE layer; the number of MoE layers stands for the output of the last decoder layer.
        kind: where `hidden` is taken from.
        rows: of each sampled row, its index among the step's tokens; the same in every layer of a step.
        num_tokens: of the step.
        hidden: (R, D) in the model's dtype; None where `kind` is NONE.
        routings: of this layer or of layers before it, as known since the last sample.
    """

    step: int
    layer: int
    kind: ObservedKind
    rows: tuple[int, ...]
    num_tokens: int
    hidden: HostCopy | None
    routings: tuple[LayerRouting, ...]


class LayerSampler(Protocol):
    """Takes samples. Called on the engine thread only: must be quick, never wait and never raise."""

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        """A forward pass begins; None for nothing of it."""

    def take(self, sample: LayerSample) -> None:
        """One layer's sample of the running step, in the order of the layers."""


def sampled_rows(spans: Sequence[StepSpan], max_rows: int) -> tuple[int, ...]:
    """Which rows of a step stand for it, ascending.

    All decode rows come first; what room is left goes to the last tokens of the prompts, in turns, since these say most
    about what comes next.
    """
    decode_rows: list[int] = []
    prefill_rows: list[range] = []
    row = 0
    for span in spans:
        rows = range(row, row + span.num_tokens)
        row = rows.stop
        if span.is_prefill:
            prefill_rows.append(rows)
        else:
            decode_rows.extend(rows)
    chosen = decode_rows[:max_rows]
    from_the_end = 1
    while len(chosen) < max_rows and prefill_rows:
        prefill_rows = [rows for rows in prefill_rows if len(rows) >= from_the_end]
        chosen.extend(rows[-from_the_end] for rows in prefill_rows[: max_rows - len(chosen)])
        from_the_end += 1
    return tuple(sorted(chosen))
