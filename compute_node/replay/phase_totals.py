"""What a run came to, prefill and decode apart: a replay's sums, and the same of the recorded run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from compute_node.replay.recorded_run import RecordedRun
from compute_node.step_ledger import Phase
from promoe.ids import ExpertId
from promoe.trace_events import LoadEvent, LoadReason


@dataclass
class PhaseTotals:
    """One phase of a run. Times in seconds; `nbytes_by_reason` left host memory while its steps ran."""

    num_steps: int = 0
    num_tokens: int = 0
    time_s: float = 0.0
    stall_s: float = 0.0
    hits: int = 0
    misses: int = 0
    late: int = 0
    nbytes_by_reason: dict[LoadReason, int] = field(default_factory=lambda: dict.fromkeys(LoadReason, 0))

    @property
    def hit_rate(self) -> float:
        """Hits divided by hits and misses."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def nbytes(self) -> int:
        """For every reason."""
        return sum(self.nbytes_by_reason.values())


def recorded_totals(run: RecordedRun) -> Mapping[Phase, PhaseTotals]:
    """What the run itself came to; bytes are those of loads that arrived, or were taken off the queue half way."""
    phases = {phase: PhaseTotals() for phase in Phase}
    # Of loads that were taken off: when each began, and the bytes that are counted already.
    counted: dict[ExpertId, tuple[float, int]] = {}
    for step in run.steps:
        totals = phases[step.phase]
        totals.num_steps += 1
        totals.num_tokens += step.start.num_tokens
        totals.time_s += step.recorded_s
        for turn in step.layers:
            totals.hits += len(turn.event.hits)
            totals.misses += len(turn.event.misses)
            totals.late += len(turn.event.late)
            totals.stall_s += turn.event.stall_s
        for event in step.events:
            if isinstance(event, LoadEvent):
                begin_s, before_nbytes = counted.pop(event.expert, (-1.0, 0))
                is_same_load = begin_s == event.begin_s
                totals.nbytes_by_reason[event.reason] += event.nbytes - (before_nbytes if is_same_load else 0)
                if event.is_paused:
                    counted[event.expert] = (event.begin_s, event.nbytes)
    return phases
