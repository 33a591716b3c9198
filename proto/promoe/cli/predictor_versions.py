"""`promoe predictor list|activate|rollback|history`: the versions of a running predictor service."""

import getpass
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, TypeAlias

import typer
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.options import JsonOption, RunDirOption
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

_COLOURS: Final = MappingProxyType(
    {VersionState.ACTIVE: "green", VersionState.PREVIOUS: "cyan", VersionState.UNUSABLE: "red"}
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
    versions = _admin(flags.predictor_endpoint, flags.run_dir).versions()
    if flags.json_:
        print_document([asdict(info) for info in versions])
        return
    output_console().print(_versions_table(versions))
    for info in versions:
        if info.fault:
            output_console().print(f"{info.version}: {info.fault}", soft_wrap=True)


def activate(flags: ActivateFlags) -> None:
    """Let a version make the hints, from the next step of every stream on."""
    change = _admin(flags.predictor_endpoint, flags.run_dir).activate(
        flags.version, getpass.getuser(), flags.why, flags.if_active
    )
    if change is None:
        output_console().print(f"{flags.version} is active already.")
    else:
        output_console().print(f"{change.after} is active now; before it was {change.before}.")


def rollback(flags: RollbackFlags) -> None:
    """Go back to the version that made the hints before, which was kept."""
    change = _admin(flags.predictor_endpoint, flags.run_dir).rollback(getpass.getuser(), flags.why, flags.if_active)
    output_console().print(f"{change.after} is active again, in place of {change.before}.")


def history(flags: HistoryFlags) -> None:
    """Show what was active when, by whom and why."""
    changes = _admin(flags.predictor_endpoint, flags.run_dir).history(flags.limit)
    if flags.json_:
        print_document([asdict(change) for change in changes])
    else:
        output_console().print(_history_table(changes))


def _admin(endpoint: str | None, run_dir: Path | None) -> PredictorAdmin:
    return PredictorAdmin(endpoint or RunDir(run_dir).predictor_endpoint)


def _versions_table(versions: list[VersionInfo]) -> Table:
    table = Table("version", "state", "kind", "from", "size", "recall@k", "trained from", "published")
    for info in versions:
        state = Text(info.state.value, style=_COLOURS.get(info.state, ""))
        recall = [metric.value for metric in info.metrics if metric.name.startswith("recall")]
        table.add_row(
            info.version,
            state,
            info.kind,
            info.origin.value,
            format_nbytes(info.size_bytes) if info.size_bytes else "",
            f"{max(recall):.3f}" if recall else "",
            info.parent,
            _local_time(info.published_unix_s) if info.published_unix_s else "",
        )
    return table


def _history_table(changes: list[VersionChange]) -> Table:
    table = Table("", "at", "what", "from", "to", "who", "why")
    for change in changes:
        at = _local_time(change.at_unix_s)
        table.add_row(str(change.number), at, change.action.value, change.before, change.after, change.who, change.why)
    return table


def _local_time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
