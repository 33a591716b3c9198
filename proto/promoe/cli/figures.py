"""The line of figures under an answer, and a running node's figures, worded the same everywhere."""

from dataclasses import asdict

from promoe.cli.quantity import format_nbytes, format_rate, format_s
from promoe.generation import Usage
from promoe.node_report import CacheStats


def answer_figures(usage: Usage) -> str:
    """Tokens per second, TTFT, TPOT, hit rate by phase, and bytes compute had to wait for, of one answer."""
    parts = [f"{usage.output_tokens} tokens"]
    if usage.tpot_s:
        parts.append(f"{1 / usage.tpot_s:.1f} tokens/s")
    parts.append(f"TTFT {format_s(usage.ttft_s)}")
    if usage.tpot_s is not None:
        parts.append(f"TPOT {format_s(usage.tpot_s)}")
    parts.append(f"hit rate prefill {format_rate(usage.prefill.hit_rate)}, decode {format_rate(usage.decode.hit_rate)}")
    parts.append(f"{format_nbytes(usage.prefill.loaded_bytes + usage.decode.loaded_bytes)} waited for")
    return " · ".join(parts)


def node_figures(stats: CacheStats) -> str:
    """What a node is doing and how its expert cache does."""
    return " · ".join(
        (
            f"{stats.running_requests} running, {stats.queued_requests} queued",
            f"{stats.decode.tokens} tokens",
            f"hit rate prefill {format_rate(stats.prefill.hit_rate)}, decode {format_rate(stats.decode.hit_rate)}",
            f"{format_nbytes(stats.uploaded_bytes)} moved",
        )
    )


def usage_document(usage: Usage) -> dict[str, object]:
    """The figures of an answer for machines, hit rates included."""
    uses = {"prefill": usage.prefill, "decode": usage.decode}
    return {**asdict(usage), **{phase: {**asdict(use), "hit_rate": use.hit_rate} for phase, use in uses.items()}}


def stats_document(stats: CacheStats) -> dict[str, object]:
    """A node's counters for machines, hit rates included."""
    phases = {"prefill": stats.prefill, "decode": stats.decode}
    return {**asdict(stats), **{name: {**asdict(phase), "hit_rate": phase.hit_rate} for name, phase in phases.items()}}
