"""The demo's questions, asked of every contestant in turn, and the table that comes of it."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from promoe.cli.console import output_console, state_console
from promoe.cli.contest import Contestant
from promoe.cli.figures import answer_figures
from promoe.cli.node_history import HintTotals, hint_totals
from promoe.cli.quantity import format_bytes_per_s, format_rate, format_s
from promoe.cli.stop_signals import StopSignals
from promoe.client import Client
from promoe.errors import InternalError
from promoe.generation import Answer, FinishReason, Usage
from promoe.node_report import CacheStats, NodeInfo

REACTIVE: Final = Contestant("reactive LRU", "lru")
PROMOE: Final = Contestant("ProMoE", "promoe", "promoe")
OURS: Final = Contestant("promoe", "proactive", "auto")
CONTESTANTS: Final = (REACTIVE, PROMOE, OURS)

ALL_MISS_SHARE: Final = 2.0
"""All-miss copy time divided by all-resident compute time on the emulated link, as in ProMoE's Figure 3."""

_ANSWER_DEADLINE_S: Final = 600.0
_MEASURED: Final = ("Tell me about the sea.", "Tell me about the mountains.")
_MEASURED_TOKENS: Final = 16


@dataclass(frozen=True)
class DemoLink:
    """How experts will travel. `settings`: of the nodes; `phrase`: for people."""

    settings: tuple[str, ...]
    phrase: str


@dataclass
class Score:
    """What one contestant's answers took, and its node's counters at the end."""

    usages: list[Usage] = field(default_factory=list)
    stats: CacheStats | None = None

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first, the median answer's."""
        return statistics.median(usage.tpot_s for usage in self.usages if usage.tpot_s is not None)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, the median answer's."""
        return statistics.median(usage.ttft_s for usage in self.usages)


@dataclass(frozen=True)
class Comparison:
    """Who did how well. `resident`: with every expert on the device."""

    scores: Mapping[Contestant, Score]
    resident: Score
    link: str


def emulated_link(resident: Client, stop: StopSignals) -> DemoLink:
    """Measures computing alone and slows the link down to it; a GPU keeps its own.

    Args:
        resident: a client of a node with every expert on the device.
    """
    info = resident.info()
    if info.device.kind != "cpu":
        return DemoLink((), f"The link is {info.device.name}'s own ({info.device.link}).")
    # The first answer warms up.
    usages = [answer_question(resident, text, _MEASURED_TOKENS, stop, _discard).usage for text in _MEASURED]
    tpot_s = usages[-1].tpot_s if usages[-1] else None
    if not tpot_s:
        raise InternalError("The answer is too short to measure the time per token.")
    model = info.model
    token_nbytes = model.num_moe_layers * model.experts_per_token * model.expert_nbytes
    bytes_per_s = round(token_nbytes / (ALL_MISS_SHARE * tpot_s))
    phrase = (
        f"With every expert resident a token takes {format_s(tpot_s)}. The link is emulated at "
        f"{format_bytes_per_s(bytes_per_s)}, so that loading all of a token's experts takes {ALL_MISS_SHARE:g} times "
        "as long."
    )
    return DemoLink((f"compute.link_bytes_per_s={bytes_per_s}",), phrase)


def compare(
    clients: Mapping[Contestant, Client],
    resident: Client,
    questions: Sequence[str],
    max_tokens: int,
    stop: StopSignals,
) -> Comparison:
    """Asks each question of all, in turn; shows the answer once.

    Raises:
        InternalError: an answer is not what an answer must be, or not the same as the others'.
    """
    scores = {contestant: Score() for contestant in clients}
    all_resident = Score()
    for number, question in enumerate(questions):
        expected = ask_question(clients[OURS], question, max_tokens, stop)
        output_console().print(_hint_phrase(clients[OURS].cache_stats()), style="dim", soft_wrap=True)
        scores[OURS].usages.append(_usage_of(expected))
        others = [contestant for contestant in clients if contestant is not OURS]
        turns = [(contestant.title, clients[contestant], scores[contestant]) for contestant in others]
        turns.append(("all resident", resident, all_resident))
        for title, client, score in (*turns[number % 3 :], *turns[: number % 3]):
            answer = answer_question(client, question, max_tokens, stop, _discard)
            if answer.token_ids != expected.token_ids:
                raise InternalError(f"{title} answers {question!r} otherwise: {answer.text!r}.")
            score.usages.append(_usage_of(answer))
            figures = f"the same under {title}: {answer_figures(_usage_of(answer))}"
            state_console().print(figures, style="dim", soft_wrap=True)
    for contestant, client in clients.items():
        scores[contestant].stats = client.cache_stats()
    return Comparison(scores, all_resident, _link_phrase(clients[OURS].info()))


def ask_question(client: Client, question: str, max_tokens: int, stop: StopSignals) -> Answer:
    """Streams one answer to standard output, with its figures; see answer_question for the error."""
    output_console().print(f"\n[bold]{question}[/bold]")
    answer = answer_question(client, question, max_tokens, stop, _write)
    output_console().print(answer_figures(_usage_of(answer)), style="dim", soft_wrap=True)
    return answer


def answer_question(
    client: Client, question: str, max_tokens: int, stop: StopSignals, write: Callable[[str], None]
) -> Answer:
    """Reads one answer; raises InternalError when it is not what an answer must be."""
    messages = [{"role": "user", "content": question}]
    with client.generate(messages, max_tokens=max_tokens, deadline_s=_ANSWER_DEADLINE_S) as stream:
        for piece in stream:
            write(piece)
            if stop.asked:
                raise typer.Exit(130)
    write("\n")
    answer = stream.answer
    if answer.usage is None or answer.finish_reason in (None, FinishReason.UNSPECIFIED):
        raise InternalError(f"The answer to {question!r} did not end properly.")
    if not answer.text.strip():
        raise InternalError(f"The answer to {question!r} is empty.")
    if answer.usage.decode.hit_rate is None:
        raise InternalError("The node counted no expert accesses: its expert cache was not used.")
    return answer


def summary(comparison: Comparison) -> Group:
    """The table, and what it was measured on."""
    table = Table(title="\npromoe demo", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in ("TPOT", "speed", "TTFT", "decode hits", "GoodPred", "MB/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = comparison.scores[REACTIVE]
    for contestant, score in comparison.scores.items():
        table.add_row(contestant.title, *_cells(score, base), style="bold" if contestant is OURS else "")
    limit = comparison.resident
    return Group(
        table,
        Text(
            f"with all experts resident: TPOT {format_s(limit.tpot_s)}, TTFT {format_s(limit.ttft_s)}\n"
            f"{comparison.link}; the rows took turns on the same questions and gave the same tokens"
        ),
    )


def decode_hints(stats: CacheStats) -> HintTotals:
    """Over all layers, lookaheads and versions."""
    return sum(hint_totals(stats).values(), HintTotals())


def _cells(score: Score, base: Score) -> tuple[str, ...]:
    assert score.stats is not None, "the counters were asked for after the last answer"
    num_tokens = score.stats.decode.tokens + score.stats.prefill.steps
    return (
        format_s(score.tpot_s),
        f"{base.tpot_s / score.tpot_s:.2f}x",
        format_s(score.ttft_s),
        format_rate(score.stats.decode.hit_rate),
        format_rate(decode_hints(score.stats).good_pred),
        f"{score.stats.uploaded_bytes / max(1, num_tokens) / 1e6:.2f}",
    )


def _hint_phrase(stats: CacheStats) -> str:
    """GoodPred beside the hit rate, both so far."""
    hints = decode_hints(stats)
    return (
        f"so far: hit rate decode {format_rate(stats.decode.hit_rate)} · GoodPred {format_rate(hints.good_pred)} "
        f"(accuracy {format_rate(hints.accuracy)} × fetch rate {format_rate(hints.fetch_rate)})"
    )


def _link_phrase(info: NodeInfo) -> str:
    rate = info.device.emulated_link_bytes_per_s
    link = f"emulated link of {format_bytes_per_s(rate)}" if rate else f"{info.device.link} link"
    return f"cache rate {info.expert_cache.cache_rate:.3g}, {link}"


def _usage_of(answer: Answer) -> Usage:
    assert answer.usage is not None, "answer_question checked it"
    return answer.usage


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _discard(piece: str) -> None:
    pass
