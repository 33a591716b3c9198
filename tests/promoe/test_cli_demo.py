"""The demo takes nothing for an answer that is none."""

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
import typer
from rich.console import Console

from promoe import Client, InternalError, Unavailable
from promoe.cli.demo import demo_folder
from promoe.cli.demo_comparison import (
    CONTESTANTS,
    OURS,
    PROMOE,
    REACTIVE,
    Comparison,
    Score,
    ask_question,
    compare,
    decode_hints,
    emulated_link,
    summary,
)
from promoe.cli.figures import answer_figures, node_figures, usage_document
from promoe.cli.stop_signals import StopSignals
from promoe.generation import ExpertUse, Usage
from promoe.v1 import inference_pb2
from tests.promoe.node_samples import cache_stats
from tests.promoe.scripted_inference import HELLO, ScriptedInference, accepted, delta, finish, serve_in_thread

NOTHING = ExpertUse(0, 0, 0, 0.0)
USAGE = Usage(3, 20, 0.25, 0.1, 0.0, NOTHING, NOTHING)


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def client(node: ScriptedInference) -> Iterator[Client]:
    with serve_in_thread(node) as endpoint, Client(endpoint) as client:
        yield client


def test_an_answer_is_streamed_with_its_figures(
    client: Client, node: ScriptedInference, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask_question(client, "Why?", 7, StopSignals())
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2
    assert capsys.readouterr().out == f"\nWhy?\nHello\n{answer_figures(answer.usage)}\n"
    assert node.requests[0].sampling.max_tokens == 7
    assert not node.requests[0].sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("end", "file", "is_kept"),
    [
        (None, "node.log", False),
        (typer.Exit(130), "node.log", False),
        (Unavailable("no wheel"), "stack.lock", False),
        (Unavailable("see the log"), "node.log", True),
    ],
)
def test_only_logs_of_a_demo_that_failed_are_kept(end: Exception | None, file: str, is_kept: bool) -> None:
    with suppress(typer.Exit, Unavailable), demo_folder() as folder:
        (folder / file).write_text("why")
        if end is not None:
            raise end
    assert folder.exists() is is_kept
    shutil.rmtree(folder, ignore_errors=True)


def test_an_empty_answer_is_a_failure(client: Client, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("  ", 1), finish())]
    with pytest.raises(InternalError, match=r"The answer to 'Why\?' is empty"):
        ask_question(client, "Why?", 7, StopSignals())


def test_an_answer_without_a_reason_to_end_is_a_failure(client: Client, node: ScriptedInference) -> None:
    end = inference_pb2.GenerateResponse(finish=inference_pb2.Finish(usage=inference_pb2.Usage(output_tokens=1)))
    node.scripts = [(accepted(), delta("Hi", 1), end)]
    with pytest.raises(InternalError, match="did not end properly"):
        ask_question(client, "Why?", 7, StopSignals())


def test_an_expert_cache_that_was_not_used_is_a_failure(client: Client, node: ScriptedInference) -> None:
    end = inference_pb2.GenerateResponse(
        finish=inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_MAX_TOKENS, usage=inference_pb2.Usage())
    )
    node.scripts = [(accepted(), delta("Hi", 1), end)]
    with pytest.raises(InternalError, match="counted no expert accesses"):
        ask_question(client, "Why?", 7, StopSignals())


def test_figures_leave_out_what_there_is_not() -> None:
    usage = Usage(3, 1, 0.25, None, 0.0, ExpertUse(1, 1, 1 << 20, 0.0), NOTHING)
    assert answer_figures(usage) == "1 tokens · TTFT 250 ms · hit rate prefill 50.0 %, decode – · 1.00 MiB waited for"
    document = usage_document(usage)
    assert (document["tpot_s"], document["output_tokens"]) == (None, 1)
    assert document["decode"] == {"hits": 0, "misses": 0, "loaded_bytes": 0, "stall_s": 0.0, "hit_rate": None}


def test_figures_of_a_node(client: Client) -> None:
    assert node_figures(client.cache_stats()) == (
        "1 running, 2 queued · 20 tokens · hit rate prefill 25.0 %, decode 75.0 % · 13.0 MiB moved"
    )


@pytest.fixture
def clients() -> Iterator[dict[str, tuple[ScriptedInference, Client]]]:
    """A scripted node for each contestant, and one with all experts resident."""
    with ExitStack() as stack:
        nodes: dict[str, tuple[ScriptedInference, Client]] = {}
        for name in (*(contestant.title for contestant in CONTESTANTS), "resident"):
            scripted = ScriptedInference(HELLO)
            nodes[name] = scripted, stack.enter_context(Client(stack.enter_context(serve_in_thread(scripted))))
        yield nodes


def test_every_question_is_asked_of_all_and_shown_once(
    clients: dict[str, tuple[ScriptedInference, Client]], capsys: pytest.CaptureFixture[str]
) -> None:
    contestants = {contestant: clients[contestant.title][1] for contestant in CONTESTANTS}
    comparison = compare(contestants, clients["resident"][1], ("One?", "Two?"), 5, StopSignals())
    for scripted, _ in clients.values():
        assert [request.chat.messages[0].content for request in scripted.requests] == ["One?", "Two?"]
        assert {request.sampling.max_tokens for request in scripted.requests} == {5}
    written = capsys.readouterr()
    assert written.out.count("Hello") == 2
    assert written.out.count("so far: hit rate decode 75.0 % · GoodPred – (accuracy – × fetch rate –)") == 2
    assert written.err.count("the same under ProMoE") == 2
    assert all(len(score.usages) == 2 and score.stats for score in comparison.scores.values())
    assert len(comparison.resident.usages) == 2


def test_another_answer_is_a_failure(clients: dict[str, tuple[ScriptedInference, Client]]) -> None:
    clients[PROMOE.title][0].scripts = [(accepted(), delta("Hel", 11), delta("p", 13), finish())]
    contestants = {contestant: clients[contestant.title][1] for contestant in CONTESTANTS}
    with pytest.raises(InternalError, match=r"ProMoE answers 'One\?' otherwise: 'Help'"):
        compare(contestants, clients["resident"][1], ("One?",), 5, StopSignals())


def test_the_link_is_slowed_down_to_what_was_measured(client: Client) -> None:
    link = emulated_link(client, StopSignals())
    # 4 layers × 2 experts of 1 MiB in twice 100 ms
    assert link.settings == (f"compute.link_bytes_per_s={8 * (1 << 20) * 5}",)
    assert "takes 100 ms" in link.phrase
    assert "41.9 MB/s" in link.phrase
    assert "2 times as long" in link.phrase


def test_a_gpu_keeps_its_own_link(client: Client, node: ScriptedInference) -> None:
    node.device_kind = "cuda"
    link = emulated_link(client, StopSignals())
    assert link.settings == ()
    assert node.requests == [], "nothing is measured"


def test_the_table_has_a_row_for_each_and_the_limit_below() -> None:
    def score(tpot_s: float) -> Score:
        usages = [replace(USAGE, tpot_s=tpot_s * factor, ttft_s=1.0) for factor in (0.5, 1.0, 9.0)]
        return Score(usages, cache_stats(40))

    scores = {REACTIVE: score(0.3), PROMOE: score(0.2), OURS: score(0.15)}
    written = io.StringIO()
    Console(file=written, width=120).print(summary(Comparison(scores, score(0.1), "cache rate 0.5, a link")))
    rows = [re.split(r"\s{2,}", line.strip()) for line in written.getvalue().splitlines()]
    cells = {row[0]: row[1:] for row in rows if len(row) == 7}
    # 42 tokens and prompts, each of which moved 40 experts of 83 kB in its step
    moved = f"{40 * 40 * 83_000 / 42 / 1e6:.2f}"
    assert cells == {
        "reactive LRU": ["300 ms", "1.00x", "1.00 s", "80.0 %", "60.9 %", moved],
        "ProMoE": ["200 ms", "1.50x", "1.00 s", "80.0 %", "60.9 %", moved],
        "promoe": ["150 ms", "2.00x", "1.00 s", "80.0 %", "60.9 %", moved],
    }
    assert "with all experts resident: TPOT 100 ms, TTFT 1.00 s\ncache rate 0.5, a link;" in written.getvalue()


def test_good_pred_is_over_all_lookaheads() -> None:
    stats = cache_stats(10)
    # Of 8 hinted experts 7 and 6 are correct, 6 and 6 are ready.
    assert decode_hints(stats).good_pred == pytest.approx(13 / 16 * 12 / 16)
    assert decode_hints(replace(stats, hints=replace(stats.hints, qualities=()))).good_pred is None
