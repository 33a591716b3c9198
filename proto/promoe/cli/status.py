"""`promoe status`: what runs here, and how its expert cache does."""

from dataclasses import asdict, dataclass
from datetime import datetime

import typer
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.figures import stats_document
from promoe.cli.options import EndpointOption, JsonOption, RunDirOption
from promoe.cli.quantity import format_bytes_per_s, format_nbytes, format_rate, format_s
from promoe.cli.run_dir import RunDir, StackState, find_endpoint, uptime_s
from promoe.cli.stack import ready_phrase
from promoe.cli.store_calls import StoreInfo, StoreStats, store_info, store_stats
from promoe.client import Client
from promoe.errors import PromoeError
from promoe.node_report import CacheStats, NodeInfo, PhaseStats, PredictorLink
from promoe.retry import RetryPolicy

_DEADLINE_S = 2.0


@dataclass(frozen=True)
class StatusFlags:
    """The flags of `promoe status`."""

    json_: JsonOption = False
    endpoint: EndpointOption = None
    run_dir: RunDirOption = None


@dataclass(frozen=True)
class StackReport:
    """What could be found out; what could not is None and has its reason in `troubles`."""

    stack: StackState | None
    endpoint: str
    node: NodeInfo | None
    cache: CacheStats | None
    store: StoreInfo | None
    store_stats: StoreStats | None
    troubles: tuple[str, ...]


def status(flags: StatusFlags) -> None:
    """Show the running stack: services, store, leases, expert cache by phase. Exit code 1 if no node answers."""
    run_dir = RunDir(flags.run_dir)
    report = _ask_around(run_dir.read_state(), find_endpoint(flags.endpoint, run_dir))
    if flags.json_:
        print_document(_document(report))
    else:
        output_console().print(_table(report))
    if report.node is None:
        raise typer.Exit(1)


def _ask_around(stack: StackState | None, endpoint: str) -> StackReport:
    troubles: list[str] = []
    node = cache = store = counters = None
    try:
        with Client(endpoint, RetryPolicy(max_attempts=1)) as client:
            node = client.info(deadline_s=_DEADLINE_S)
            cache = client.cache_stats(deadline_s=_DEADLINE_S)
    except PromoeError as error:
        troubles.append(str(error))
    # The node knows its own store; the one of the stack here may be another node's.
    store_endpoint = node.store.endpoint if node else stack.store_endpoint if stack else ""
    if store_endpoint:
        try:
            store = store_info(store_endpoint, _DEADLINE_S)
            counters = store_stats(store_endpoint, _DEADLINE_S)
        except PromoeError as error:
            troubles.append(str(error))
    return StackReport(stack, endpoint, node, cache, store, counters, tuple(troubles))


def _table(report: StackReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if report.stack is not None:
        stack = report.stack
        table.add_row("stack", f"{stack.phase}, up {format_s(uptime_s(stack))} (process {stack.pid})")
        if stack.http_url:
            table.add_row("http", stack.http_url)
    else:
        table.add_row("stack", "none was started here with `promoe up`")
    if report.node is not None:
        node = report.node
        table.add_row("model", _model_phrase(node))
        table.add_row("node", ready_phrase(report.endpoint, node))
        table.add_row("", f"{node.engine.value} engine: {node.engine_reason}")
        table.add_row("", f"{node.device.name}: {node.device.reason}")
        table.add_row("", f"store {node.store.state.value}, link {node.device.link}")
        table.add_row("predictor", _predictor_row(node))
        for phrase in takeover_phrases(node.predictor):
            table.add_row("", phrase)
    if report.store is not None:
        table.add_row("store", _store_phrase(report.store))
    if report.store_stats is not None:
        for phrase in _store_counters(report.store_stats):
            table.add_row("", phrase)
    if report.cache is not None:
        for name, phrase in _cache_rows(report.cache):
            table.add_row(name, phrase)
    for trouble in report.troubles:
        table.add_row(Text("trouble", style="red"), trouble)
    return table


def _model_phrase(node: NodeInfo) -> str:
    model = node.model
    return (
        f"{model.name} ({model.family}): {model.num_moe_layers} MoE layers × {model.num_experts} experts, "
        f"{model.experts_per_token} per token, {format_nbytes(model.experts_nbytes)} in {model.dtype.value}"
    )


def _predictor_row(node: NodeInfo) -> str:
    link = node.predictor
    if link.active is None:
        return f"{link.state.value}: {link.endpoint}" if link.endpoint else "none"
    distance = ", ".join(map(str, link.active.lookaheads)) or "none"
    return f"{link.active.version} at {link.endpoint}: {link.state.value}, lookahead {distance}"


def takeover_phrases(link: PredictorLink) -> list[str]:
    """Since when a node listens to its predictor, and what goes on beside."""
    phrases = [f"{link.candidate} is tried out beside it"] if link.candidate else []
    switch = link.last_switch
    if switch is not None:
        at = datetime.fromtimestamp(switch.at_unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        if switch.is_return:
            phrases.append(f"gone back to at {at}: {switch.why}")
        else:
            phrases.append(f"since {at}, by the wish of {switch.who}" + (f": {switch.why}" if switch.why else ""))
    if link.previous:
        phrases.append(f"on trial; if it fails, the node goes back to {link.previous}")
    return phrases


def _store_phrase(store: StoreInfo) -> str:
    return (
        f"{store.fill_state.value}: {format_nbytes(store.filled_bytes)} of {format_nbytes(store.total_bytes)}, "
        f"arena {store.arena.kind}"
    )


def _store_counters(stats: StoreStats) -> list[str]:
    filled = "adopted, not filled again" if stats.adopted else f"filled in {format_s(stats.fill_s)}"
    if not stats.adopted:
        filled += f" at {format_bytes_per_s(stats.fill_bytes_per_s)}"
    phrases = [f"{filled}; {stats.published_blobs} experts, {stats.damaged_blobs} damaged"]
    phrases += [f"lease of process {lease.pid}, held {format_s(lease.held_s)}" for lease in stats.leases]
    return phrases


def _cache_rows(stats: CacheStats) -> list[tuple[str, str]]:
    rows = [("prefill", _phase_phrase(stats.prefill)), ("decode", _phase_phrase(stats.decode))]
    rows.append(("link", f"{format_nbytes(stats.uploaded_bytes)} moved, busy {format_s(stats.link_busy_s)}"))
    rows.append(("requests", f"{stats.running_requests} running, {stats.queued_requests} queued"))
    return rows


def _phase_phrase(phase: PhaseStats) -> str:
    return (
        f"hit rate {format_rate(phase.hit_rate)} ({phase.hits} hits, {phase.misses} misses), "
        f"{phase.tokens} tokens in {phase.steps} steps, {format_nbytes(phase.demand_bytes)} demanded, "
        f"stalled {format_s(phase.stall_s)}"
    )


def _document(report: StackReport) -> dict[str, object]:
    document = asdict(report)
    if report.cache is not None:
        document["cache"] = stats_document(report.cache)
    return document
