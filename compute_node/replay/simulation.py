"""Runs the expert cache itself over a recorded run in virtual time: compute takes as long as recorded, copies what the
link's model says, and hints come as planned."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from compute_node.clocked_transfers import ClockedTransfers, LinkModel
from compute_node.expert_cache import CacheSnapshot, CacheSurroundings, ExpertCache
from compute_node.expert_history import ExpertHistory
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.prefetch_counters import PrefetchCounters
from compute_node.replay.hint_plan import HintPlan, HintSettings, Observed, plan_hints
from compute_node.replay.phase_totals import PhaseTotals
from compute_node.replay.recorded_run import RecordedLayer, RecordedRun, RecordedStep
from compute_node.replay.virtual_clock import VirtualClock, VirtualMarks
from compute_node.schedule import SchedulePolicy, SlotSplit
from compute_node.slots import CacheGeometry
from compute_node.step_ledger import Phase


@dataclass(frozen=True)
class WhatIf:
    """What is replayed with.

    Attributes:
        policy: how slots are filled and given up, and how loads are cut.
        slots_per_layer: on average; a policy may split them unevenly.
        link: what copies cost.
        hints: where they come from.
    """

    policy: SchedulePolicy
    slots_per_layer: int
    link: LinkModel
    hints: HintSettings


@dataclass(frozen=True)
class Outcome:
    """What a replay came to."""

    phases: Mapping[Phase, PhaseTotals]
    prefetches: PrefetchCounters
    link_busy_s: float


def starting_snapshot(run: RecordedRun, geometry: CacheGeometry, split: SlotSplit) -> CacheSnapshot:
    """What the slots hold at the beginning: as recorded, as far as it fits; the rest of each layer's share by number.

    So is a cache warmed at start-up.
    """
    resident = list(run.header.resident)
    width, share = geometry.num_experts, geometry.slots_per_layer
    keeps_to_layers = all(number < 0 or number // width == slot // share for slot, number in enumerate(resident))
    if len(resident) != geometry.num_slots or (split is SlotSplit.LAYER and not keeps_to_layers):
        by_layer: list[list[int]] = [[] for _ in range(geometry.num_layers)]
        for number in resident:
            if number >= 0:
                by_layer[number // width].append(number)
        resident = []
        for layer, held in enumerate(by_layer):
            others = (number for number in range(layer * width, (layer + 1) * width) if number not in held)
            resident += [*held, *others][:share]
    history_json = run.header.history_json
    if history_json in ("", "{}"):
        history_json = ExpertHistory(geometry.num_layers, width, geometry.experts_per_token).to_json()
    return CacheSnapshot(resident, history_json)


class Simulation:
    """One replay in virtual time.

    Attributes:
        expert_cache: the product's own.
        transfers: its link.
    """

    def __init__(self, run: RecordedRun, settings: WhatIf) -> None:
        self._run = run
        self._clock = VirtualClock()
        self._inbox = HintInbox()
        self._hints: HintPlan = plan_hints(run, settings.hints)
        geometry = replace(run.geometry, slots_per_layer=settings.slots_per_layer)
        chunks = settings.policy.chunk_settings(geometry.blob_nbytes)
        self.transfers = ClockedTransfers(self._clock, settings.link, chunks)
        self.expert_cache = ExpertCache(
            range(geometry.num_slots),
            geometry,
            settings.policy,
            CacheSurroundings(
                marks=VirtualMarks(self._clock),
                transfers=self.transfers,
                source_address=lambda expert: 0,
                hints=self._inbox,
                clock=self._clock,
            ),
        )
        self.expert_cache.restore(starting_snapshot(run, geometry, settings.policy.slot_split))
        self._totals = {phase: PhaseTotals() for phase in Phase}

    def run(self) -> Outcome:
        """Walks through all steps."""
        for step in self._run.steps:
            self._run_step(step)
        return Outcome(self._totals, self.expert_cache.prefetch_counters, self.transfers.meter.busy_s)

    def _run_step(self, step: RecordedStep) -> None:
        totals = self._totals[step.phase]
        began_s, moved_nbytes = self._clock(), self.transfers.queue.moved_nbytes
        self.expert_cache.begin_step(step.start)
        for turn in step.layers:
            self._observe(step, turn.event.layer)
            self.expert_cache.notice()
            self._clock.advance(turn.lead_s)
            self._run_layer(turn, totals)
        self._observe(step, len(step.layers))
        self._clock.advance(step.tail_s)
        totals.num_steps += 1
        totals.num_tokens += step.start.num_tokens
        totals.time_s += self._clock() - began_s
        for reason, nbytes in self.transfers.queue.moved_nbytes.items():
            totals.nbytes_by_reason[reason] += nbytes - moved_nbytes[reason]

    def _run_layer(self, turn: RecordedLayer, totals: PhaseTotals) -> None:
        expert_s = turn.experts_s / max(1, len(turn.needed))
        with self.expert_cache.acquire(turn.event.layer, turn.needed, turn.event.topk_ids_TK) as acquisition:
            for _ in self.expert_cache.arrivals(acquisition):
                self._clock.advance(expert_s)
        totals.hits += len(acquisition.hits)
        totals.misses += len(acquisition.misses)
        totals.late += len(acquisition.late)
        totals.stall_s += acquisition.stall_s

    def _observe(self, step: RecordedStep, layer: int) -> None:
        """Hints made from what is seen now are on their way."""
        for planned in self._hints.get(Observed(step.start.step, layer), ()):
            put = partial(self._inbox.put, ReceivedHint(planned.hint, planned.delay_s))
            self._clock.plan(self._clock() + planned.delay_s, put)
