"""What a replay prints: a table for people, a document for machines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from compute_node.replay.limits import PhaseLimits
from compute_node.replay.phase_totals import PhaseTotals, recorded_totals
from compute_node.replay.recorded_order import Verification
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import Outcome, WhatIf
from compute_node.schedule import POLICIES
from compute_node.step_ledger import Phase
from promoe.trace_events import LoadReason


@dataclass(frozen=True)
class Replayed:
    """One row. `cache_rate`: slots divided by experts."""

    settings: WhatIf
    cache_rate: float
    outcome: Outcome
    limits: Mapping[Phase, PhaseLimits]

    @property
    def time_s(self) -> float:
        """Of both phases."""
        return sum(totals.time_s for totals in self.outcome.phases.values())

    @property
    def name(self) -> str:
        """Policy and cache rate; an eviction that is not the policy's own, too."""
        policy = self.settings.policy
        own = POLICIES[policy.name].eviction
        return f"{policy.name}{'' if policy.eviction == own else '/' + policy.eviction} @ {self.cache_rate:.3g}"


@dataclass(frozen=True)
class ReplayReport:
    """Everything about one trace. `verification`: of the run's own policy, unless something else was asked for."""

    run: RecordedRun
    verification: Verification | None
    rows: Sequence[Replayed]

    def as_document(self) -> dict[str, object]:
        """For JSON; times in seconds, sizes in bytes."""
        recorded = recorded_totals(self.run)
        return {
            "model": self.run.header.model.name,
            "steps": len(self.run.steps),
            "accesses": self.run.num_accesses,
            "recorded": {phase.value: _totals(recorded[phase]) for phase in Phase},
            "verified": None if self.verification is None else asdict(self.verification),
            "replays": [_row_document(row) for row in self.rows],
        }

    def as_json(self) -> str:
        """The document, indented."""
        return json.dumps(self.as_document(), indent=2)

    def as_text(self) -> str:
        """For people."""
        recorded = recorded_totals(self.run)
        rates = {row.settings.link.bytes_per_s for row in self.rows}
        lines = [
            (
                f"{self.run.header.model.name}, {self.run.geometry.num_layers} MoE layers of "
                f"{self.run.geometry.num_experts} experts"
            ),
            f"{len(self.run.steps)} steps, {self.run.num_accesses} expert accesses",
            *(f"link {rate / 1e6:.4g} MB/s" for rate in rates),
        ]
        if self.verification is not None:
            lines += [_verdict(self.verification), *_time_lines(recorded, self.rows)]
        for phase in Phase:
            if recorded[phase].num_steps:
                lines += ["", *_phase_table(phase, recorded[phase], self.rows)]
        lines += ["", *_prefetch_lines(self.rows)]
        return "\n".join(line.rstrip() for line in lines).rstrip()


def _verdict(verification: Verification) -> str:
    if verification.parted is None:
        return (
            f"Repeated exactly: hits and misses of all {verification.num_layers} layers "
            f"({verification.num_accesses} accesses) are those of the run."
        )
    return f"Repeated {verification.num_layers} layers; then replay and run part at {verification.parted}"


def _time_lines(recorded: Mapping[Phase, PhaseTotals], rows: Sequence[Replayed]) -> list[str]:
    recorded_s = sum(totals.time_s for totals in recorded.values())
    return [
        f"Simulated in {row.time_s:.3f} s what took {recorded_s:.3f} s ({row.time_s / recorded_s - 1:+.1%})."
        for row in rows
        if recorded_s
    ]


def _phase_table(phase: Phase, recorded: PhaseTotals, rows: Sequence[Replayed]) -> list[str]:
    table = [
        ["", "ms/step", "stall", "hit rate", "late", "MB/step", "Belady hit", "Belady MB", "floor ms", "x floor"],
        ["as recorded", *_figures(recorded), "", "", "", ""],
    ]
    for row in rows:
        totals, limits = row.outcome.phases[phase], row.limits[phase]
        steps = max(1, totals.num_steps)
        optimum = max(limits.belady_equal.hit_rate, limits.belady_pooled.hit_rate)
        table.append(
            [
                row.name,
                *_figures(totals),
                f"{optimum:.3f}",
                f"{limits.least_nbytes / steps / 1e6:.2f}",
                f"{limits.floor_s / steps * 1e3:.2f}",
                f"{totals.time_s / limits.floor_s:.2f}" if limits.floor_s else "",
            ]
        )
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    title = f"{phase.value}: {recorded.num_steps} steps, {recorded.num_tokens} tokens"
    return [title, *("  ".join(_aligned(cells, widths)) for cells in table)]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = zip(cells, widths, strict=True)
    return [cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)]


def _figures(totals: PhaseTotals) -> list[str]:
    steps = max(1, totals.num_steps)
    return [
        f"{totals.time_s / steps * 1e3:.2f}",
        f"{totals.stall_s / totals.time_s:.1%}" if totals.time_s else "",
        f"{totals.hit_rate:.3f}",
        str(totals.late),
        f"{totals.nbytes / steps / 1e6:.2f}",
    ]


def _totals(totals: PhaseTotals) -> dict[str, object]:
    return {
        "steps": totals.num_steps,
        "tokens": totals.num_tokens,
        "time_s": totals.time_s,
        "stall_s": totals.stall_s,
        "hits": totals.hits,
        "misses": totals.misses,
        "late": totals.late,
        "hit_rate": totals.hit_rate,
        "bytes": totals.nbytes,
        "bytes_by_reason": {reason.value: totals.nbytes_by_reason[reason] for reason in LoadReason},
    }


def _limits(limits: PhaseLimits, totals: PhaseTotals) -> dict[str, object]:
    return {
        "all_resident_s": limits.all_resident_s,
        "belady_equal_hit_rate": limits.belady_equal.hit_rate,
        "belady_pooled_hit_rate": limits.belady_pooled.hit_rate,
        "belady_bytes": limits.least_nbytes,
        "floor_s": limits.floor_s,
        "time_per_floor": totals.time_s / limits.floor_s if limits.floor_s else None,
        "bytes_per_belady": totals.nbytes / limits.least_nbytes if limits.least_nbytes else None,
    }


def _row_document(row: Replayed) -> dict[str, object]:
    policy, hints = row.settings.policy, row.settings.hints
    phases = {
        phase.value: {**_totals(totals), "limits": _limits(row.limits[phase], totals)}
        for phase, totals in row.outcome.phases.items()
    }
    return {
        "name": row.name,
        "policy": {**asdict(policy), "slot_split": policy.slot_split.value, "hints": policy.hints.value},
        "cache_rate": row.cache_rate,
        "slots_per_layer": row.settings.slots_per_layer,
        "link_bytes_per_s": row.settings.link.bytes_per_s,
        "chunk_s": row.settings.link.chunk_s,
        "predictor": {**asdict(hints), "source": hints.source.value},
        **phases,
        "prefetched_bytes": asdict(row.outcome.prefetches),
        "link_busy_s": row.outcome.link_busy_s,
    }


def _prefetch_lines(rows: Sequence[Replayed]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        prefetched = row.outcome.prefetches
        useful, late, wasted = prefetched.useful_nbytes, prefetched.late_nbytes, prefetched.wasted_nbytes
        if useful or late or wasted or prefetched.streamed_nbytes:
            lines.append(
                f"prefetched by {row.name}: {useful / 1e6:.1f} MB useful, "
                f"{late / 1e6:.1f} MB late, {wasted / 1e6:.1f} MB wasted, "
                f"{prefetched.streamed_nbytes / 1e6:.1f} MB streamed"
            )
    return lines
