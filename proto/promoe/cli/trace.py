"""`promoe trace`: recorded runs."""

import typer

from promoe.cli.options import takes
from promoe.cli.trace_record import RecordFlags, record
from promoe.cli.trace_replay import PASS_THROUGH, replay
from promoe.cli.trace_stats import StatsFlags, stats
from promoe.cli.trace_timeline import TimelineFlags, timeline


def make_trace_app() -> typer.Typer:
    """The subcommands of `promoe trace`."""
    app = typer.Typer(
        name="trace",
        help="Record runs, look at what they did, and ask what they could have done.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.command()(takes(RecordFlags)(record))
    app.command()(takes(StatsFlags)(stats))
    app.command()(takes(TimelineFlags)(timeline))
    app.command(context_settings=dict(PASS_THROUGH), add_help_option=False)(replay)
    return app
