"""Recorded runs without a node: made-up routing, and what the expert cache tells while it is simulated over it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from compute_node.clocked_transfers import LinkModel
from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import Outcome, Simulation, WhatIf
from compute_node.schedule import POLICIES, SchedulePolicy
from promoe.trace_events import StepEvent, TraceEvent
from promoe.trace_file import TraceWriter
from promoe.trace_header import TraceHeader
from tests.promoe.traces import MadeUpRun

LINK = LinkModel(4e6)
"""Half of a made-up run's time is copying on it."""


def by_step(events: Iterable[TraceEvent]) -> list[list[TraceEvent]]:
    """Each list begins with its StepEvent."""
    steps: list[list[TraceEvent]] = []
    for event in events:
        if isinstance(event, StepEvent):
            steps.append([])
        steps[-1].append(event)
    return steps


def made_up(shape: MadeUpRun) -> RecordedRun:
    """A run with its own LRU decisions."""
    return RecordedRun.of(shape.header(), by_step(shape.events()))


def what_if(policy: str | SchedulePolicy, slots: int, hints: HintSettings | None = None) -> WhatIf:
    """On the usual link, with a perfect predictor unless hints are given."""
    chosen = POLICIES[policy] if isinstance(policy, str) else policy
    return WhatIf(chosen, slots, LINK, hints or HintSettings(HintSource.ORACLE))


class TracedSimulation:
    """A simulation that is recorded as a node would be.

    Args:
        run: what it walks through.
        settings: with which.
        first_step: the recording begins with it, while the run is going on.
    """

    def __init__(self, run: RecordedRun, settings: WhatIf, first_step: int = 1) -> None:
        self._settings = settings
        self._run = run
        self._first_step = first_step
        self.simulation = Simulation(run, settings)
        self.events: list[TraceEvent] = []
        self.simulation.expert_cache.sinks.append(self._record)
        self.outcome: Outcome = self.simulation.run()

    def _record(self, event: TraceEvent) -> None:
        if isinstance(event, StepEvent) and event.step == self._first_step:
            self._snapshot = self.simulation.expert_cache.snapshot()
        if self.events or (isinstance(event, StepEvent) and event.step >= self._first_step):
            self.events.append(event)

    def header(self) -> TraceHeader:
        """As a node with these settings would have written it."""
        policy, header = self._settings.policy, self._run.header
        blob_nbytes = self._run.geometry.blob_nbytes
        shape = replace(
            header.shape,
            slots_per_layer=self._settings.slots_per_layer,
            policy=policy.name,
            eviction=policy.eviction,
            slot_split=policy.slot_split.value,
            hints=policy.hints.value,
            chunk_nbytes=policy.chunk_settings(blob_nbytes).chunk_nbytes or blob_nbytes,
            chunks_demand=policy.chunks_demand,
            max_chunks_in_flight=policy.max_chunks_in_flight,
            early_preemption=policy.early_preemption,
            reorder=policy.reorder,
            stream_prefill=policy.stream_prefill,
            serial=policy.serial,
        )
        return replace(
            header,
            shape=shape,
            # Chunks are handed over ahead, as to a GPU.
            device=replace(header.device, link="registered"),
            link_bytes_per_s=self._settings.link.bytes_per_s,
            resident=tuple(self._snapshot.resident),
            history_json=self._snapshot.history_json,
        )

    def recorded(self) -> RecordedRun:
        """The run that a replay would read."""
        return RecordedRun.of(self.header(), by_step(self.events))

    def write(self, path: Path) -> Path:
        """Into a trace file."""
        with TraceWriter(path, self.header()) as writer:
            for event in self.events:
                writer.append(event)
        return path
