"""`promoe trace stats`: what a recorded run was like."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from promoe.cli.console import output_console, print_document
from promoe.cli.options import JsonOption
from promoe.cli.quantity import format_bytes_per_s, format_nbytes, format_rate, format_s

if TYPE_CHECKING:
    # Arrow and numpy: no other command is to wait for them.
    from promoe.cli.routing_statistics import LayerRouting
    from promoe.cli.trace_digest import PhaseDigest, TraceDigest

CACHE_RATES: Final = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Whose LRU hit rates are shown."""


@dataclass(frozen=True)
class StatsFlags:
    """The flags of `promoe trace stats`."""

    trace: Annotated[Path, typer.Argument(help="A trace file.")]
    json_: JsonOption = False


def stats(flags: StatsFlags) -> None:
    """Show what a trace has in it: skew, reuse, overlap and predictability of its routing, loads and hints."""
    from promoe.cli.trace_digest import digest_trace
    from promoe.trace_file import TraceReader

    reader = TraceReader(flags.trace)
    digest = digest_trace(reader, CACHE_RATES)
    if flags.json_:
        print_document(asdict(digest))
        return
    console = output_console()
    console.print(_summary(flags.trace, digest))
    for phase in (digest.decode, digest.prefill):
        if phase.tokens:
            console.print(_routing_table(phase), _foresight_table(phase))
    if digest.loads:
        console.print(_load_table(digest))
    if digest.hints:
        console.print(_hint_table(digest))


def _summary(path: Path, digest: "TraceDigest") -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    model, shape = digest.header.model, digest.header.shape
    table.add_row("trace", f"{path}, {format_nbytes(digest.file_nbytes)}, {digest.events} events")
    if not digest.is_complete:
        table.add_row("", "[yellow]it was cut off: these are the events up to its last whole batch[/yellow]")
    if digest.dropped_steps:
        table.add_row("", f"[yellow]{digest.dropped_steps} steps were left out while recording[/yellow]")
    table.add_row(
        "model",
        f"{model.name}: {model.num_moe_layers} MoE layers × {model.num_experts} experts, "
        f"{model.experts_per_token} per token, {format_nbytes(model.expert_nbytes)} each",
    )
    table.add_row(
        "expert cache", f"cache rate {shape.cache_rate:.3g}, {shape.slots_per_layer} slots per layer, {shape.eviction}"
    )
    table.add_row("link", f"{format_bytes_per_s(digest.header.link_bytes_per_s)}, {digest.header.device.link}")
    table.add_row("run", f"{digest.requests} requests in {format_s(digest.duration_s)}, hidden states: {digest.hidden}")
    for name, phase in (("prefill", digest.prefill), ("decode", digest.decode)):
        table.add_row(
            name,
            f"{phase.tokens} tokens in {phase.steps} steps, hit rate {format_rate(phase.hit_rate)} ({phase.hits} hits, "
            f"{phase.misses} misses, {phase.late} of them late prefetches), stalled {format_s(phase.stall_s)}",
        )
    return table


def _routing_table(phase: "PhaseDigest") -> Table:
    table = Table(title=f"{phase.name}: routing by layer", title_justify="left")
    columns = ["layer", "entropy", "busiest ¼", "overlap", "by chance"]
    columns += [f"LRU {rate:.3g}" for rate in CACHE_RATES]
    _add_columns(table, columns)
    for layer, routing in enumerate(phase.layers):
        table.add_row(str(layer), *_routing_cells(routing), *map(format_rate, phase.lru_hit_rates[layer]))
    table.add_section()
    table.add_row("mean", *_routing_cells(phase.mean), *map(format_rate, phase.mean_lru_hit_rates), style="bold")
    return table


def _routing_cells(routing: "LayerRouting") -> list[str]:
    entropy = "–" if routing.entropy is None else f"{routing.entropy:.3f}"
    shares = (routing.busiest_share, routing.overlap, routing.chance_overlap)
    return [entropy, *map(format_rate, shares)]


def _foresight_table(phase: "PhaseDigest") -> Table:
    table = Table(title=f"{phase.name}: share of a token's experts that is foreseen", title_justify="left")
    lookaheads = [f"transition {lookahead}" for lookahead in range(1, len(phase.mean.transition) + 1)]
    _add_columns(table, ["layer", "previous token", "frequency", *lookaheads])
    for layer, routing in enumerate(phase.layers):
        table.add_row(str(layer), *_foresight_cells(routing))
    table.add_section()
    table.add_row("mean", *_foresight_cells(phase.mean), style="bold")
    return table


def _foresight_cells(routing: "LayerRouting") -> list[str]:
    return [format_rate(share) for share in (routing.overlap, routing.frequency, *routing.transition)]


def _load_table(digest: "TraceDigest") -> Table:
    table = Table(title="loads", title_justify="left")
    _add_columns(table, ["reason", "experts", "bytes", "left off half way", "mean time on the link"])
    for reason, totals in digest.loads.items():
        mean_s = totals.link_s / totals.loads if totals.loads else 0.0
        cells = (str(totals.loads), format_nbytes(totals.nbytes), format_nbytes(totals.paused_nbytes), format_s(mean_s))
        table.add_row(reason, *cells)
    return table


def _hint_table(digest: "TraceDigest") -> Table:
    fates = ", ".join(f"{count} {fate}" for fate, count in digest.fates.items())
    table = Table(title=f"hints ({fates})", title_justify="left")
    _add_columns(table, ["version", "lookahead", "phase", "hints", "accuracy", "recall at 1.5 k", "latency", "p99"])
    for hints in digest.hints:
        table.add_row(
            hints.version,
            str(hints.lookahead),
            hints.phase,
            str(hints.hints),
            format_rate(hints.accuracy),
            format_rate(hints.recall),
            *("–" if seconds is None else format_s(seconds) for seconds in (hints.latency_s, hints.latency_p99_s)),
        )
    return table


def _add_columns(table: Table, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
