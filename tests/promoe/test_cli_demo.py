"""The demo takes nothing for an answer that is none."""

import shutil
from collections.abc import Iterator
from contextlib import suppress

import pytest
import typer

from promoe import Client, InternalError, Unavailable
from promoe.cli.demo import ask_question, demo_folder
from promoe.cli.figures import answer_figures, node_figures, usage_document
from promoe.cli.stop_signals import StopSignals
from promoe.generation import ExpertUse, Usage
from promoe.v1 import inference_pb2
from tests.promoe.scripted_inference import HELLO, ScriptedInference, accepted, delta, finish, serve_in_thread

NOTHING = ExpertUse(0, 0, 0, 0.0)


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
    usage = ask_question(client, "Why?", 7, StopSignals())
    assert usage.output_tokens == 2
    assert capsys.readouterr().out == f"\nWhy?\nHello\n{answer_figures(usage)}\n"
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
    assert answer_figures(usage) == "1 tokens · TTFT 250 ms · hit rate prefill 50.0 %, decode – · 1.00 MiB moved"
    document = usage_document(usage)
    assert (document["tpot_s"], document["output_tokens"]) == (None, 1)
    assert document["decode"] == {"hits": 0, "misses": 0, "loaded_bytes": 0, "stall_s": 0.0, "hit_rate": None}


def test_figures_of_a_node(client: Client) -> None:
    assert node_figures(client.cache_stats()) == (
        "1 running, 2 queued · 20 tokens · hit rate prefill 25.0 %, decode 75.0 % · 13.0 MiB moved"
    )
