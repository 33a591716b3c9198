"""`promoe predictor watch`: how well the versions of a running service predict, side by side and live."""

from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Annotated, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.options import JsonOption, RunDirOption
from promoe.cli.predictor_versions import STATE_COLOURS, PredictorOption, find_admin
from promoe.cli.quantity import format_nbytes, format_s
from promoe.cli.run_dir import RunDir, find_endpoint
from promoe.client import Client
from promoe.errors import PromoeError
from promoe.node_report import PrefetchStats
from promoe.predictor_versions import QualityReport, VersionQuality, VersionState
from promoe.retry import RetryPolicy

_NODE_DEADLINE_S: Final = 1.0
_NOTHING: Final = "—"


@dataclass(frozen=True)
class WatchFlags:
    """The flags of `promoe predictor watch`."""

    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0
    once: Annotated[bool, typer.Option("--once", help="Score for one interval, print the table, and end.")] = False
    json_: JsonOption = False
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


def watch(flags: WatchFlags) -> None:
    """Show how well the active version, its shadow and its canary predict what is decoded. Ctrl-C ends it."""
    console = output_console()
    reports = find_admin(flags.predictor_endpoint, flags.run_dir).watch(flags.interval)
    prefetched = _Prefetched(RunDir(flags.run_dir))
    with closing(reports):
        if flags.once or flags.json_ or not console.is_terminal:
            first, *rest = islice(reports, 2)
            report = rest[0] if rest else first
            if flags.json_:
                print_document(asdict(report))
            else:
                console.print(quality_view(report, prefetched.since()))
            return
        try:
            with Live(console=console, auto_refresh=False) as live:
                for report in reports:
                    live.update(quality_view(report, prefetched.since()), refresh=True)
        except KeyboardInterrupt:
            return


def quality_view(report: QualityReport, prefetched: PrefetchStats | None) -> RenderableType:
    """The table, and what there is to say below it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", no_wrap=True)
    table.add_column("does")
    for name in ("steps", "recall", "accuracy", "fetch rate", "GoodPred", "cost"):
        table.add_column(name, justify="right", min_width=7 if name in ("fetch rate", "GoodPred") else 5)
    for quality in report.qualities:
        table.add_row(*_row(quality))
    lines: list[RenderableType] = [table]
    if not any(quality.steps for quality in report.qualities):
        lines.append(
            Text("Nothing was scored yet: steps are, in which every token is decoded and misses are not rare.", "dim")
        )
    if report.comparisons:
        told = f"In {report.comparisons} steps that both were scored in, the shadow's recall is {report.gain:+.3f}."
        lines.append(Text(told))
    lines += [Text(f"{quality.version}: {quality.fault}", "red") for quality in report.qualities if quality.fault]
    if prefetched is not None:
        lines.append(Text(_prefetch_line(prefetched), "dim"))
    return Group(*lines)


def _row(quality: VersionQuality) -> tuple[str | Text, ...]:
    accuracy = _share(quality.correct, quality.hinted)
    fetch_rate = _share(quality.ready, quality.hinted)
    good = None if accuracy is None or fetch_rate is None else accuracy * fetch_rate
    # What looks on has nothing fetched for it: the least that it would have had.
    at_least = "≥" if quality.state is VersionState.SHADOW else ""
    cost = format_us(quality.predict_s / quality.observations) if quality.observations else _NOTHING
    return (
        quality.version,
        Text(quality.state.value, style=STATE_COLOURS.get(quality.state, "")),
        str(quality.steps),
        _figure(_share(quality.found, quality.routed)),
        _figure(accuracy),
        _figure(fetch_rate, at_least),
        _figure(good, at_least),
        cost,
    )


def format_us(seconds: float) -> str:
    """Per observation; `85 µs`, or as other times are written."""
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.9995e-3 else format_s(seconds)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _figure(value: float | None, before: str = "") -> str:
    return _NOTHING if value is None else f"{before}{value:.3f}"


def _prefetch_line(stats: PrefetchStats) -> str:
    useful, late, wasted = (format_nbytes(n) for n in (stats.useful_bytes, stats.late_bytes, stats.wasted_bytes))
    return f"The node's prefetches since you watch: {useful} useful, {late} late, {wasted} wasted."


class _Prefetched:
    """What the node beside the service has prefetched since this was made; None where it cannot be asked."""

    def __init__(self, run_dir: RunDir) -> None:
        self._endpoint: str | None
        try:
            self._endpoint = find_endpoint(None, run_dir)
        except PromoeError:
            self._endpoint = None
        self._before = self._ask()

    def since(self) -> PrefetchStats | None:
        """The difference."""
        before, now = self._before, self._ask()
        if before is None or now is None:
            return None
        return PrefetchStats(
            useful_bytes=now.useful_bytes - before.useful_bytes,
            late_bytes=now.late_bytes - before.late_bytes,
            wasted_bytes=now.wasted_bytes - before.wasted_bytes,
            streamed_bytes=now.streamed_bytes - before.streamed_bytes,
            link_bytes_per_s=now.link_bytes_per_s,
        )

    def _ask(self) -> PrefetchStats | None:
        if self._endpoint is None:
            return None
        try:
            with Client(self._endpoint, RetryPolicy(max_attempts=1)) as client:
                return client.cache_stats(deadline_s=_NODE_DEADLINE_S).prefetch
        except PromoeError:
            return None
