"""Which hints a replay is given, and how long after the observation that they were made from.

An observation is made when its layer begins (layer input), or when its routing is known (router input).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from compute_node.replay.recorded_run import RecordedRun, RecordedStep
from promoe.hint import Hint

ORACLE_VERSION: Final = "oracle@replay"


class HintSource(Enum):
    """RECORDED: those of the run. ORACLE: each layer's routing itself, `lookahead` layers ahead. NONE: no predictor."""

    RECORDED = "recorded"
    ORACLE = "oracle"
    NONE = "none"


@dataclass(frozen=True)
class HintSettings:
    """What is asked for.

    Attributes:
        source: see HintSource.
        lookahead: the oracle's, in MoE layers.
        latency_s: from observation to hint; None: as recorded, and none for the oracle.
    """

    source: HintSource = HintSource.RECORDED
    lookahead: int = 2
    latency_s: float | None = None

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(f"lookahead is {self.lookahead}; allowed: 1 or more")
        if self.latency_s is not None and self.latency_s < 0:
            raise ValueError(f"latency_s is {self.latency_s}; allowed: 0 or more")


class Observed(NamedTuple):
    """A layer's turn in a step; the number of MoE layers stands for the end of the last one."""

    step: int
    layer: int


@dataclass(frozen=True, eq=False)
class PlannedHint:
    """`delay_s` after its layer began."""

    delay_s: float
    hint: Hint


HintPlan: TypeAlias = Mapping[Observed, Sequence[PlannedHint]]


def plan_hints(run: RecordedRun, settings: HintSettings) -> HintPlan:
    """The hints by what they were made from."""
    if settings.source is HintSource.ORACLE:
        return _oracle_hints(run, settings)
    if settings.source is HintSource.RECORDED:
        return _recorded_hints(run, settings.latency_s)
    return MappingProxyType({})


def _recorded_hints(run: RecordedRun, latency_s: float | None) -> HintPlan:
    steps = {step.start.step: step for step in run.steps}
    plan: defaultdict[Observed, list[PlannedHint]] = defaultdict(list)
    for event in run.hints():
        hint = event.hint
        observed = Observed(hint.observed_step, hint.observed_layer)
        step = steps.get(observed.step)
        if step is None:
            continue
        began_s, lead_s = _turn(step, observed.layer)
        recorded_s = event.latency_s if event.latency_s is not None else max(0.0, event.at_s - began_s)
        # Noticed too late to have been sent when the layer began: then it was sent when the routing was known.
        sent_s = lead_s if event.at_s - recorded_s >= began_s + lead_s else 0.0
        plan[observed].append(PlannedHint(sent_s + (recorded_s if latency_s is None else latency_s), hint))
    return plan


def _turn(step: RecordedStep, layer: int) -> tuple[float, float]:
    """When the layer's turn began on the trace's clock, and how long until its routing was known."""
    if layer >= len(step.layers):
        return step.layers[-1].event.end_s, 0.0
    turn = step.layers[layer]
    return turn.event.at_s - turn.lead_s, turn.lead_s


def _oracle_hints(run: RecordedRun, settings: HintSettings) -> HintPlan:
    num_layers = run.geometry.num_layers
    turns = [(step.start.step, turn) for step in run.steps for turn in step.layers]
    plan: dict[Observed, list[PlannedHint]] = {}
    for (step, turn), (target_step, target) in zip(turns, turns[settings.lookahead :], strict=False):
        if target_step > step + (turn.event.layer + settings.lookahead) // num_layers:
            continue  # steps are missing in between
        observed = Observed(step, turn.event.layer)
        experts = np.array(target.needed, np.uint16)
        hint = Hint(
            step=target_step,
            layer=target.event.layer,
            observed_step=step,
            observed_layer=turn.event.layer,
            experts=experts,
            scores=np.ones(len(experts), np.float32),
            num_expected=len(experts),
            version=ORACLE_VERSION,
        )
        plan[observed] = [PlannedHint(settings.latency_s or 0.0, hint)]
    return plan
