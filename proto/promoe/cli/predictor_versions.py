"""`promoe predictor list|activate|shadow|rollback|history`: the versions of a running predictor service."""

import getpass
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, TypeAlias

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.options import JsonOption, RunDirOption, share
from promoe.cli.quantity import format_nbytes
from promoe.cli.run_dir import RunDir
from promoe.predictor_admin import PredictorAdmin
from promoe.predictor_versions import VersionChange, VersionInfo, VersionState

PredictorOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--predictor-endpoint", help="Predictor service; default: the one running here."),
]
WhyOption: TypeAlias = Annotated[str, typer.Option("--why", help="Written into the history.")]
ExpectOption: TypeAlias = Annotated[
    str | None, typer.Option("--if-active", help="Only if this version is active now.", metavar="NAME@VERSION")
]

STATE_COLOURS: Final = MappingProxyType(
    {
        VersionState.ACTIVE: "green",
        VersionState.PREVIOUS: "cyan",
        VersionState.SHADOW: "magenta",
        VersionState.CANARY: "yellow",
        VersionState.UNUSABLE: "red",
    }
)


@dataclass(frozen=True)
class ListFlags:
    """The flags of `promoe predictor list`."""

    json_: JsonOption = False
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


@dataclass(frozen=True)
class ActivateFlags:
    """The flags of `promoe predictor activate`."""

    version: Annotated[str, typer.Argument(help="NAME@VERSION, or a plug-in's name; see `promoe predictor list`.")]
    why: WhyOption = "asked for at the command line"
    if_active: ExpectOption = None
    canary: Annotated[
        float | None,
        typer.Option("--canary", parser=share, metavar="SHARE", help="Only for so large a part of the requests: 10%."),
    ] = None
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


@dataclass(frozen=True)
class ShadowFlags:
    """The flags of `promoe predictor shadow`."""

    version: Annotated[
        str | None, typer.Argument(help="NAME@VERSION, or a plug-in's name; see `promoe predictor list`.")
    ] = None
    clear: Annotated[bool, typer.Option("--clear", help="End what looks on now.")] = False
    why: WhyOption = "asked for at the command line"
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


@dataclass(frozen=True)
class RollbackFlags:
    """The flags of `promoe predictor rollback`."""

    why: WhyOption = "asked for at the command line"
    if_active: ExpectOption = None
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


@dataclass(frozen=True)
class HistoryFlags:
    """The flags of `promoe predictor history`."""

    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20
    json_: JsonOption = False
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


def list_versions(flags: ListFlags) -> None:
    """Show every version of a predictor that could make the hints, and which one does."""
    versions = find_admin(flags.predictor_endpoint, flags.run_dir).versions()
    if flags.json_:
        print_document([asdict(info) for info in versions])
        return
    output_console().print(_versions_table(versions))
    for info in versions:
        if info.fault:
            output_console().print(f"{info.version}: {info.fault}", soft_wrap=True)


def activate(flags: ActivateFlags) -> None:
    """Let a version make the hints, from the next step of every stream on."""
    part = flags.canary
    change = find_admin(flags.predictor_endpoint, flags.run_dir).activate(
        flags.version, getpass.getuser(), flags.why, flags.if_active, part
    )
    if change is None and part is None:
        output_console().print(f"{flags.version} is active already.")
    elif change is None:
        output_console().print(f"{flags.version} has that share of the requests already.")
    elif part is not None:
        output_console().print(
            f"{change.version} makes the hints of {100 * part:.3g} % of the requests; {change.after} of the others."
        )
    else:
        output_console().print(f"{change.after} is active now; before it was {change.before}.")


def shadow(flags: ShadowFlags) -> None:
    """Let a version look on without effect, and be scored: see `promoe predictor watch`."""
    if flags.clear == (flags.version is not None):
        raise typer.BadParameter("Name a version, or say --clear.")
    admin, who = find_admin(flags.predictor_endpoint, flags.run_dir), getpass.getuser()
    if flags.version is None:
        cleared = admin.clear_shadow(who, flags.why)
        text = "Nobody looks on." if cleared is None else f"{cleared.version} looks on no more."
    else:
        change = admin.set_shadow(flags.version, who, flags.why)
        text = f"{flags.version} looks on already." if change is None else f"{change.version} looks on now."
    output_console().print(text)


def rollback(flags: RollbackFlags) -> None:
    """Go back to the version that made the hints before, which was kept."""
    change = find_admin(flags.predictor_endpoint, flags.run_dir).rollback(getpass.getuser(), flags.why, flags.if_active)
    if change.version:
        output_console().print(f"{change.version} makes no hints any more; {change.after} makes those of all requests.")
    else:
        output_console().print(f"{change.after} is active again, in place of {change.before}.")


def history(flags: HistoryFlags) -> None:
    """Show what was active when, by whom and why."""
    changes = find_admin(flags.predictor_endpoint, flags.run_dir).history(flags.limit)
    if flags.json_:
        print_document([asdict(change) for change in changes])
    else:
        for change in changes:
            output_console().print(_history_lines(change))


def find_admin(endpoint: str | None, run_dir: Path | None) -> PredictorAdmin:
    """Of the service that was named, or of the one running here."""
    return PredictorAdmin(endpoint or RunDir(run_dir).predictor_endpoint)


def _versions_table(versions: list[VersionInfo]) -> Table:
    has_parents = any(info.parent for info in versions)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", no_wrap=True)
    for name in ("state", "from", "size", "recall@k", *(("trained from",) if has_parents else ()), "published"):
        table.add_column(name)
    for info in versions:
        recall = [metric.value for metric in info.metrics if metric.name.startswith("recall_at_k_")]
        table.add_row(
            info.version,
            Text(info.state.value, style=STATE_COLOURS.get(info.state, "")),
            info.origin.value,
            format_nbytes(info.size_bytes) if info.size_bytes else "",
            f"{max(recall):.3f}" if recall else "",
            *((info.parent,) if has_parents else ()),
            _local_time(info.published_unix_s) if info.published_unix_s else "",
        )
    return table


def _history_lines(change: VersionChange) -> Text:
    """Two lines, which a narrow terminal can wrap."""
    what = change.action.value.replace("_", " ")
    if change.version:
        versions = f"{change.version}, beside {change.after}"
    else:
        versions = f"{change.before} → {change.after}" if change.before else change.after
    numbers = ", ".join(f"{number.name} {number.value:.4g}" for number in change.numbers)
    text = Text(f"{change.number:>4}  {_local_time(change.at_unix_s)}  ", "dim")
    text.append(what, "bold").append(f"  {versions}\n", "")
    return text.append(f"      {change.who}: {change.why}" + (f" ({numbers})" if numbers else ""), "")


def _local_time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
