"""Time per output token at a cache rate: the expert cache itself, run in virtual time over a routing.

A band, not a number. Its lower end: a perfect predictor, compute bound by memory alone, a short context. Its upper end:
no predictor at all, the program's own cost in every layer, a full context. A real predictor lies between.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compute_node.clocked_transfers import LinkModel
from compute_node.planning.compute_cost import ComputeCost
from compute_node.planning.made_up_run import distinct_experts, with_cost
from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import Outcome, Simulation, WhatIf
from compute_node.schedule import SchedulePolicy
from compute_node.step_ledger import Phase


@dataclass(frozen=True)
class CostBand:
    """Compute with all experts resident, at its least and at its most."""

    low: ComputeCost
    high: ComputeCost


@dataclass(frozen=True)
class RatedForecast:
    """What decoding comes to with so many slots.

    Attributes:
        slots_per_layer: with these.
        tpot_low_s, tpot_high_s: see the module.
        hit_rate_low, hit_rate_high: without a predictor, and with a perfect one.
    """

    slots_per_layer: int
    tpot_low_s: float
    tpot_high_s: float
    hit_rate_low: float
    hit_rate_high: float


@dataclass(frozen=True)
class Forecaster:
    """Asks the simulation.

    Args:
        run: the routing; without compute times.
        policy: the schedule.
        link_bytes_per_s: of host memory to device.
        costs: of computing.
    """

    run: RecordedRun
    policy: SchedulePolicy
    link_bytes_per_s: float
    costs: CostBand

    def at(self, slots_per_layer: int) -> RatedForecast:
        """One cache rate."""
        if slots_per_layer == self.run.geometry.num_experts:
            distinct = distinct_experts(self.run)
            return RatedForecast(
                slots_per_layer, self.costs.low.step_s(distinct), self.costs.high.step_s(distinct), 1.0, 1.0
            )
        best = self._simulated(slots_per_layer, self.costs.low, HintSource.ORACLE)
        worst = self._simulated(slots_per_layer, self.costs.high, HintSource.NONE)
        return RatedForecast(
            slots_per_layer,
            tpot_low_s=_tpot_s(best),
            tpot_high_s=_tpot_s(worst),
            hit_rate_low=worst.phases[Phase.DECODE].hit_rate,
            hit_rate_high=best.phases[Phase.DECODE].hit_rate,
        )

    def _simulated(self, slots_per_layer: int, cost: ComputeCost, source: HintSource) -> Outcome:
        link = LinkModel(self.link_bytes_per_s)
        settings = WhatIf(self.policy, slots_per_layer, link, HintSettings(source))
        return Simulation(with_cost(self.run, cost), settings).run()


def ladder(num_experts: int, planned: Sequence[int]) -> list[int]:
    """Slots per layer that are worth a look: quarters of all, and what is planned."""
    quarters = {max(1, num_experts * quarter // 4) for quarter in (1, 2, 3, 4)}
    return sorted(quarters | set(planned))


def _tpot_s(outcome: Outcome) -> float:
    decode = outcome.phases[Phase.DECODE]
    return decode.time_s / max(1, decode.num_steps)
