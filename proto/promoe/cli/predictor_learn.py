"""`promoe predictor learn`: what the learner of a running service is doing, and what it should do."""

import getpass
from dataclasses import asdict, dataclass
from typing import Annotated, Final

import typer
from rich.text import Text

from promoe.cli.console import output_console, print_document
from promoe.cli.options import JsonOption, RunDirOption
from promoe.cli.predictor_versions import PredictorOption, WhyOption, find_admin
from promoe.cli.quantity import format_nbytes, format_s
from promoe.predictor_versions import LearnerReport, LearnerState

_JUDGED: Final = frozenset(
    ("documents", "gain", "gain_at_least", "e_value", "e_value_needed", "give_up_e_value", "give_up_e_value_needed")
)
"""Names of a judgement's numbers."""


@dataclass(frozen=True)
class LearnFlags:
    """The flags of `promoe predictor learn`."""

    now: Annotated[bool, typer.Option("--now", help="Train a candidate as soon as it can be.")] = False
    pause: Annotated[bool, typer.Option("--pause", help="Gather and train nothing.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on.")] = False
    why: WhyOption = "asked for at the command line"
    json_: JsonOption = False
    predictor_endpoint: PredictorOption = None
    run_dir: RunDirOption = None


def learn(flags: LearnFlags) -> None:
    """Show what the service learns from what it serves; with an option, tell it what to do first."""
    if flags.now + flags.pause + flags.resume > 1:
        raise typer.BadParameter("Say one of --now, --pause and --resume.")
    admin, who = find_admin(flags.predictor_endpoint, flags.run_dir), getpass.getuser()
    if flags.now and not admin.train(who, flags.why):
        output_console().print("A candidate is trained or tried already; the next one can come when that is over.")
    if flags.pause or flags.resume:
        admin.pause_learner(flags.pause, who)
    report = admin.learner()
    if flags.json_:
        print_document(asdict(report))
    else:
        output_console().print(learner_lines(report))


def learner_lines(report: LearnerReport) -> Text:
    """What it does, what it holds, how a judgement stands."""
    text = Text(report.state.value + (", paused" if report.paused else ""), "bold")
    if report.news:
        text.append(f"\n{report.news}", "")
    if report.state not in (LearnerState.OFF, LearnerState.FAILED):
        text.append(
            f"\n{report.documents} requests are held: {report.tokens} tokens, "
            f"{format_nbytes(report.size_bytes)}, the oldest from {format_s(report.oldest_s)} ago.",
            "",
        )
    if report.progress:
        text.append(f"\n{_judgement_line(report)}", "")
    return text


def _judgement_line(report: LearnerReport) -> str:
    """How far the comparison is, and what would decide it."""
    numbers = {number.name: number.value for number in report.progress}
    if not _JUDGED.issubset(numbers):  # of a service of another version
        return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    # While a promotion is watched, the version before it looks on.
    who = "The version before" if report.state is LearnerState.WATCHING else "The candidate"
    return (
        f"{who} was compared on {numbers['documents']:.0f} requests: its recall differs by {numbers['gain']:+.4f} "
        f"({numbers['gain_at_least']:+.4f} or more is all but sure). Evidence that it is better: "
        f"{numbers['e_value']:.3g} of {numbers['e_value_needed']:.3g}; that it is not: "
        f"{numbers['give_up_e_value']:.3g} of {numbers['give_up_e_value_needed']:.3g}."
    )
