"""`python -m compute_node.replay TRACE`: repeats a recorded run, or asks what other settings would have done.

The report on stdout, errors on stderr; exit status 0, 1 after an error or where a repetition parts from its run, 2 for
a wrong command line.
"""

import sys
from collections.abc import Sequence

import typer

from compute_node.compilation import execution
from compute_node.replay.limits import limits_of
from compute_node.replay.options import ReplayOptions, parse_options
from compute_node.replay.recorded_order import verify
from compute_node.replay.recorded_policy import recorded_policy
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.report import Replayed, ReplayReport
from compute_node.replay.simulation import Simulation
from promoe.errors import PromoeError
from promoe.trace_file import TraceReader


def replay(options: ReplayOptions) -> ReplayReport:
    """Raises PromoeError for a trace that cannot be replayed, ValueError for settings that do not fit it."""
    run = RecordedRun.read(TraceReader(options.trace))
    verification = None if options.is_what_if else verify(run, recorded_policy(run.header))
    rows = [
        Replayed(
            settings=settings,
            cache_rate=settings.slots_per_layer / run.geometry.num_experts,
            outcome=Simulation(run, settings).run(),
            limits=limits_of(run, settings.slots_per_layer, settings.link.bytes_per_s),
        )
        for settings in options.what_ifs(run)
    ]
    return ReplayReport(run, verification, rows)


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    options = parse_options(arguments)
    try:
        execution()
        report = replay(options)
    except (PromoeError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    typer.echo(report.as_json() if options.as_json else report.as_text())
    return 0 if report.verification is None or report.verification.parted is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
