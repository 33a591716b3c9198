"""`promoe doctor`: looks at the host and says what to mend."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.diagnosis import Finding, Verdict
from promoe.cli.gpu_checks import check_gpu
from promoe.cli.host_checks import check_disk, check_huge_pages, check_memlock, check_memory, check_shared_memory
from promoe.cli.options import JsonOption, RunDirOption
from promoe.cli.pack_cache import cache_home
from promoe.cli.run_dir import DEFAULT_LISTEN, RunDir
from promoe.cli.software_checks import check_packages, check_port, check_python, check_run_dir

_STYLES: Final = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


@dataclass(frozen=True)
class DoctorFlags:
    """The flags of `promoe doctor`."""

    json_: JsonOption = False
    run_dir: RunDirOption = None
    listen: Annotated[str, typer.Option(help="Address that `promoe up` would serve on.")] = DEFAULT_LISTEN
    disk: Annotated[Path | None, typer.Option(help="Folder whose disk is measured; default: the cache folder.")] = None


def doctor(flags: DoctorFlags) -> None:
    """Check this machine: each line is ok, warn or fail, with the mend. Exit code 1 if anything fails."""
    findings = examine(flags)
    if flags.json_:
        print_document([asdict(finding) for finding in findings])
    else:
        output_console().print(_table(findings))
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(1)


def examine(flags: DoctorFlags) -> list[Finding]:
    """All findings, in the order they are shown."""
    run_dir = RunDir(flags.run_dir)
    gpu = check_gpu()
    has_gpu = any(finding.name == "gpu" and finding.verdict is Verdict.OK for finding in gpu)
    return [
        check_python(),
        *check_packages(),
        *gpu,
        *check_memory(),
        check_memlock(),
        *check_shared_memory(),
        check_huge_pages(has_gpu),
        *check_disk(flags.disk or cache_home()),
        check_run_dir(run_dir),
        check_port(flags.listen, run_dir),
    ]


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        what = Text(finding.found)
        if finding.mend:
            what.append(f"\n→ {finding.mend}", style=_STYLES[finding.verdict])
        table.add_row(Text(finding.verdict.value, style=_STYLES[finding.verdict]), finding.name, what)
    return table
