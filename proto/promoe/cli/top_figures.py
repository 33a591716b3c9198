"""The figures of `promoe top`: the last seconds beside the time since the node's start, as lines of text."""

from collections.abc import Callable
from typing import Final, TypeAlias

from rich.text import Text

from promoe.cli.node_history import Counter, HintTotals, Window
from promoe.cli.quantity import format_bytes_per_s, format_nbytes, format_rate, format_s
from promoe.node_report import CacheStats, Histogram, PhaseStats

NAME_WIDTH: Final = 17
COLUMN_WIDTH: Final = 12
FIGURES_WIDTH: Final = NAME_WIDTH + 2 * COLUMN_WIDTH

_PhaseOf: TypeAlias = Callable[[CacheStats], PhaseStats]


def figure_lines(lately: Window | None, total: Window, version: str | None) -> list[Text]:
    """Most wanted first: what does not fit is cut off at the end.

    Args:
        lately: the last seconds; None where they are not known yet.
        total: since the node's start.
        version: the predictor's, whose hints are judged; None for all.
    """
    return [
        _row("", f"last {format_s(lately.elapsed_s)}" if lately else "", "since start", "dim"),
        *_phase_lines(lately, total),
        *_stall_lines(lately, total),
        *_link_lines(lately, total),
        *_prefetch_lines(lately, total),
        *_quality_lines(lately, total, version),
        *_hint_lines(total.now),
    ]


def _phase_lines(lately: Window | None, total: Window) -> list[Text]:
    lines: list[Text] = []
    for name, phase in (("decode", _decode), ("prefill", _prefill)):
        per_s = lately.per_s(_tokens(phase)) if lately else None
        lines.append(_row(name, _number(per_s, "tok/s"), f"{phase(total.now).tokens} tok"))
        lines.append(_row("  hit rate", *_shares(lately, total, _hits(phase), _accesses(phase))))
    return lines


def _stall_lines(lately: Window | None, total: Window) -> list[Text]:
    """Lately: the share of the time. Since the start: seconds, because the node does not tell how long it computed."""

    def row(name: str, seconds: Counter) -> Text:
        return _row(name, format_rate(lately.per_s(seconds) if lately else None), format_s(seconds(total.now)))

    return [
        row("stalled", _stall_s),
        row("  nothing came", lambda stats: _stall_s(stats) - _late_stall_s(stats)),
        row("  came too late", _late_stall_s),
    ]


def _link_lines(lately: Window | None, total: Window) -> list[Text]:
    def row(name: str, nbytes: Counter) -> Text:
        per_s = lately.per_s(nbytes) if lately else None
        return _row(
            name, "–" if per_s is None else format_bytes_per_s(max(0, per_s)), format_nbytes(max(0, nbytes(total.now)))
        )

    lines = [
        row("link", lambda stats: stats.uploaded_bytes),
        row("  on demand", _demand_nbytes),
        row("  prefetch", _prefetch_nbytes),
        row("  layer streaming", lambda stats: stats.prefetch.streamed_bytes),
    ]
    peak = total.now.prefetch.link_bytes_per_s
    if peak > 0:
        per_s = lately.per_s(lambda stats: stats.uploaded_bytes) if lately else None
        lines.append(
            _row("  of what it can", format_rate(None if per_s is None else per_s / peak), format_bytes_per_s(peak))
        )
    return lines


def _prefetch_lines(lately: Window | None, total: Window) -> list[Text]:
    if _judged_nbytes(total.now) == 0:
        return []
    return [_row("useful/late/waste", _fates(lately), _fates(total))]


def _quality_lines(lately: Window | None, total: Window, version: str | None) -> list[Text]:
    ever = total.hints(version)
    recent = lately.hints(version) if lately else {}
    lines: list[Text] = []
    for lookahead, totals in ever.items():
        judged = recent.get(lookahead), totals
        lines.append(
            _row(f"GoodPred, ahead {lookahead}", *(format_rate(one.good_pred if one else None) for one in judged))
        )
        lines.append(_row("  accur. × fetch", *(_factors(one) for one in judged)))
    return lines


def _hint_lines(stats: CacheStats) -> list[Text]:
    hints = stats.hints
    fates = {
        "late": hints.late,
        "invalid": hints.invalid,
        "of another version": hints.wrong_version,
        "too many": hints.overflow,
    }
    dropped = ", ".join(f"{name} {count}" for name, count in fates.items() if count)
    lines = [Text(f"hints: taken {hints.taken}{', ' if dropped else ''}{dropped}")]
    if hints.observations_dropped:
        lines.append(Text(f"observations: sent {hints.observations_sent}, dropped {hints.observations_dropped}"))
    for name, histogram in (("hint latency", hints.latency), ("time until use", hints.time_until_use)):
        if sum(histogram.counts):
            median, p99 = (quantile_phrase(histogram, share) for share in (0.5, 0.99))
            lines.append(Text(f"{name}: median {median}, p99 {p99}"))
    return lines


def quantile_phrase(histogram: Histogram, share: float) -> str:
    """The bucket that a share of the counts lies in or below: `≤ 5.0 ms`, or `> 1.00 s` in the last one."""
    wanted = share * sum(histogram.counts)
    seen = 0
    for bound_s, count in zip(histogram.bounds_s, histogram.counts, strict=False):
        seen += count
        if seen >= wanted:
            return f"≤ {format_s(bound_s)}"
    return f"> {format_s(histogram.bounds_s[-1])}"


def _factors(totals: HintTotals | None) -> str:
    """GoodPred's two factors in per cent."""
    if totals is None or totals.accuracy is None or totals.fetch_rate is None:
        return "–"
    return f"{100 * totals.accuracy:.0f} × {100 * totals.fetch_rate:.0f} %"


def _fates(window: Window | None) -> str:
    """What became of prefetched bytes, in per cent."""
    shares = [window.share(part, _judged_nbytes) if window else None for part in (_useful, _late, _wasted)]
    return "–" if None in shares else "/".join(f"{100 * share:.0f}" for share in shares if share is not None) + " %"


def _shares(lately: Window | None, total: Window, part: Counter, whole: Counter) -> tuple[str, str]:
    return format_rate(lately.share(part, whole) if lately else None), format_rate(total.share(part, whole))


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.1f} {unit}"


def _row(name: str, recent: str, ever: str, style: str = "") -> Text:
    return Text(f"{name:<{NAME_WIDTH}}{recent:>{COLUMN_WIDTH}}{ever:>{COLUMN_WIDTH}}", style=style)


def _decode(stats: CacheStats) -> PhaseStats:
    return stats.decode


def _prefill(stats: CacheStats) -> PhaseStats:
    return stats.prefill


def _tokens(phase: _PhaseOf) -> Counter:
    return lambda stats: phase(stats).tokens


def _hits(phase: _PhaseOf) -> Counter:
    return lambda stats: phase(stats).hits


def _accesses(phase: _PhaseOf) -> Counter:
    return lambda stats: phase(stats).hits + phase(stats).misses


def _stall_s(stats: CacheStats) -> float:
    return stats.prefill.stall_s + stats.decode.stall_s


def _late_stall_s(stats: CacheStats) -> float:
    return stats.prefill.late_prefetch_stall_s + stats.decode.late_prefetch_stall_s


def _demand_nbytes(stats: CacheStats) -> float:
    return stats.prefill.demand_bytes + stats.decode.demand_bytes


def _prefetch_nbytes(stats: CacheStats) -> float:
    """What was neither asked for on demand nor streamed."""
    return stats.uploaded_bytes - _demand_nbytes(stats) - stats.prefetch.streamed_bytes


def _useful(stats: CacheStats) -> float:
    return stats.prefetch.useful_bytes


def _late(stats: CacheStats) -> float:
    return stats.prefetch.late_bytes


def _wasted(stats: CacheStats) -> float:
    return stats.prefetch.wasted_bytes


def _judged_nbytes(stats: CacheStats) -> float:
    return _useful(stats) + _late(stats) + _wasted(stats)
