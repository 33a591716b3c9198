"""`promoe trace record` against scripted nodes over real sockets: what is in the file, what is said, when it ends."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe.cli.prompt_source import PromptItem, packaged_prompts, read_prompts
from promoe.cli.trace_recording import WholeSteps
from promoe.errors import InvalidInput, ModelNotFound, Overloaded, Unavailable
from promoe.trace_events import LayerEvent, StepEvent, TraceBatch, TraceEvent
from promoe.trace_file import TraceReader
from promoe.trace_wire import encode_batch
from promoe.typed_message import encode_message
from promoe.v1 import inference_pb2
from tests.promoe.command_line import CommandLine
from tests.promoe.scripted_inference import HELLO, Act, ScriptedInference, Step, accepted, serve_in_thread
from tests.promoe.traces import MadeUpRun, same_event
from tests.running_store import wait_until

RUN = MadeUpRun()
EVENTS = list(RUN.events(hidden=True))
FIRST_STEP = EVENTS[: next(n for n, event in enumerate(EVENTS) if isinstance(event, StepEvent) and event.step == 2)]
OPENED: tuple[Step, ...] = (
    inference_pb2.TraceResponse(),
    inference_pb2.TraceResponse(header=encode_message(RUN.header(), inference_pb2.TraceHeader)),
)
DEADLINE_S = 20.0


def batch(events: list[TraceEvent], dropped_steps: int = 0) -> inference_pb2.TraceResponse:
    return encode_batch(TraceBatch(tuple(events), dropped_steps))


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def endpoint(node: ScriptedInference) -> Iterator[str]:
    with serve_in_thread(node) as endpoint:
        yield endpoint


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def same_events(path: Path, events: list[TraceEvent]) -> bool:
    read = list(TraceReader(path))
    return len(read) == len(events) and all(map(same_event, read, events))


def test_everything_that_came_is_in_the_file(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(EVENTS[:40]), batch(EVENTS[40:], dropped_steps=3), Act.HANG)
    out = tmp_path / "run.trace"
    flags = ("--rows", "5", "--layer-input", "--steps", "14")
    ran = command_line.run("trace", "record", str(out), "-e", endpoint, *flags)
    assert ran.code == 0, ran.err
    reader = TraceReader(out)
    assert reader.header == RUN.header()
    assert (reader.summary.is_complete, reader.summary.dropped_steps) == (True, 3)
    assert same_events(out, EVENTS)
    assert "14 steps, 22 tokens of 2 requests in" in ran.err
    assert "3 steps left out → " in ran.err
    assert "can be learned from, but not replayed" in ran.err
    assert ran.out == ""
    assert node.trace_requests == [inference_pb2.TraceRequest(max_rows=5, layer_input=True)]
    assert node.hung_up.wait(DEADLINE_S)


def test_ctrl_c_ends_a_recording_that_keeps_what_it_has(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(EVENTS), Act.HANG)

    def interrupt() -> None:
        wait_until((tmp_path / "t.part").exists, DEADLINE_S)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint)
    assert ran.code == 0, ran.err
    assert same_events(tmp_path / "t", EVENTS)
    assert not (tmp_path / "t.part").exists()


@pytest.mark.parametrize("flags", [("--steps", "1"), ("--seconds", "0.3")])
def test_it_ends_by_itself_when_it_is_told_to(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path, flags: tuple[str, str]
) -> None:
    node.trace_script = (*OPENED, batch(FIRST_STEP), Act.HANG)
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint, *flags)
    assert ran.code == 0, ran.err
    assert same_events(tmp_path / "t", FIRST_STEP)
    assert node.trace_requests == [inference_pb2.TraceRequest()]


def test_prompts_are_sent_meanwhile_and_end_it(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(FIRST_STEP), Act.HANG)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n\n  How?  \nWho?\n")
    arguments = ("--prompts", str(prompts), "-n", "9", "--at-once", "2", "--num-prompts", "2")
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint, *arguments)
    assert ran.code == 0, ran.err
    asked = sorted((r.chat.messages[0].content, r.sampling.seed, r.sampling.max_tokens) for r in node.requests)
    assert asked == [("How?", 1, 9), ("Why?", 0, 9)]
    assert same_events(tmp_path / "t", FIRST_STEP)


def test_documents_are_cut_to_the_context(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(FIRST_STEP), Act.HANG)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("x" * 600)
    (texts / "short.txt").write_text("In the beginning")
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint, "--prompts", str(texts), "-n", "12")
    assert ran.code == 0, ran.err
    # The scripted node has a context of 512 tokens, one per character.
    assert [len(request.token_ids.ids) for request in node.requests] == [500, 16]


def test_a_prompt_that_fails_is_told_and_the_trace_is_kept(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(FIRST_STEP), Act.HANG)
    node.scripts = [(accepted(), InvalidInput("No such model."))]
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint, "--prompts", "chat")
    assert (ran.code, ran.err) == (1, "error: No such model.\n")
    assert TraceReader(tmp_path / "t").summary.is_complete


def test_a_node_that_dies_leaves_what_was_recorded(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (*OPENED, batch(FIRST_STEP + EVENTS[len(FIRST_STEP) :][:4]), Unavailable("I am gone."))
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint)
    assert (ran.code, ran.err) == (1, "error: I am gone.\n")
    assert same_events(tmp_path / "t", FIRST_STEP)  # not the half step behind it


def test_nothing_recorded_is_no_file(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (OPENED[0], Act.HANG)
    ran = command_line.run("trace", "record", str(tmp_path / "t"), "-e", endpoint, "--seconds", "0.2")
    assert ran.code == 1
    assert "Nothing was recorded" in ran.err
    assert not (tmp_path / "t").exists()


def test_refusals_are_sentences(
    node: ScriptedInference, endpoint: str, command_line: CommandLine, tmp_path: Path
) -> None:
    node.trace_script = (Overloaded("One at a time."),)
    out = str(tmp_path / "t")
    assert command_line.run("trace", "record", out, "-e", endpoint).err == "error: One at a time.\n"
    rows = command_line.run("trace", "record", out, "-e", endpoint, "--rows", "3")
    assert (rows.code, rows.err.startswith("error: --rows is 3, but no hidden states are asked for")) == (2, True)
    missing = command_line.run("trace", "record", out, "-e", endpoint, "--prompts", str(tmp_path / "none"))
    assert missing.code == 1
    assert "There are no prompts at" in missing.err
    node.trace_script = (*OPENED, batch(FIRST_STEP), Act.HANG)
    nowhere = command_line.run("trace", "record", str(tmp_path / "no" / "t"), "-e", endpoint, "--steps", "1")
    assert nowhere.code == 1
    assert "No such file or directory" in nowhere.err


def test_the_packaged_prompts_are_many_and_varied() -> None:
    items = packaged_prompts()
    assert len(items) >= 300
    assert len({item.text for item in items}) == len(items)
    assert len({item.text.split()[0] for item in items}) >= 30
    assert max(len(item.text) for item in items) > 10 * min(len(item.text) for item in items)
    assert not any(item.is_document for item in items)
    assert read_prompts("chat") == items


def test_prompts_come_from_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second\ndocument")
    (tmp_path / "a.txt").write_text("First")
    (tmp_path / "empty").write_text(" \n")
    assert read_prompts(str(tmp_path)) == [PromptItem("First", True), PromptItem("Second\ndocument", True)]
    assert read_prompts(str(tmp_path / "b.txt")) == [PromptItem("Second"), PromptItem("document")]
    with pytest.raises(InvalidInput, match="has no prompts"):
        read_prompts(str(tmp_path / "empty"))
    with pytest.raises(ModelNotFound, match="There are no prompts at"):
        read_prompts(str(tmp_path / "none"))
    (tmp_path / "raw").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="is no UTF-8 text"):
        read_prompts(str(tmp_path / "raw"))


def test_only_whole_steps_are_let_through() -> None:
    whole_steps = WholeSteps(RUN.num_layers)
    second = EVENTS[len(FIRST_STEP) : 2 * len(FIRST_STEP)]
    half = [event for event in second if not (isinstance(event, LayerEvent) and event.layer == RUN.num_layers - 1)]
    written = list(itertools.chain.from_iterable(map(whole_steps.add, FIRST_STEP)))
    assert all(map(same_event, written, FIRST_STEP))
    assert len(written) == len(FIRST_STEP)
    assert not list(itertools.chain.from_iterable(map(whole_steps.add, half[:5])))
    # A step that failed half way is all there is of it when the next one begins.
    assert whole_steps.add(FIRST_STEP[0]) == half[:5]
