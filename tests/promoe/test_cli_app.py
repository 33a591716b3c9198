"""The commands against scripted nodes over real sockets: what is written where, and exit codes."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promoe.cli.console import print_error
from promoe.cli.run_dir import RunDir, StackState
from promoe.errors import InvalidInput
from tests.promoe.command_line import CommandLine, Ran
from tests.promoe.on_terminal import on_terminal
from tests.promoe.scripted_inference import HELLO, Act, ScriptedInference, accepted, delta, serve_in_thread

DEADLINE_S = 30.0


Run = Callable[..., Ran]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return CommandLine(folder, monkeypatch, capsys).run


@pytest.fixture
def node() -> ScriptedInference:
    return ScriptedInference(HELLO)


@pytest.fixture
def endpoint(node: ScriptedInference) -> Iterator[str]:
    with serve_in_thread(node) as endpoint:
        yield endpoint


def test_generate_streams_the_answer_and_a_line_of_figures(run: Run, endpoint: str, node: ScriptedInference) -> None:
    ran = run("generate", "Why?", "--endpoint", endpoint, "-n", "9", "-t", "0.5", "--seed", "3", "--stop", "a b")
    assert (ran.code, ran.out) == (0, "Hello\n")
    assert ran.err == (
        "2 tokens · 10.0 tokens/s · TTFT 500 ms · TPOT 100 ms · hit rate prefill 75.0 %, decode 75.0 % · "
        "2.00 MiB waited for\n"
    )
    request = node.requests[0]
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "Why?")]
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.5, 3)
    assert list(request.sampling.stop_strings) == ["a b"]
    assert not request.sampling.HasField("top_p")


def test_generate_takes_a_system_message_raw_text_and_standard_input(
    run: Run, endpoint: str, node: ScriptedInference
) -> None:
    run("generate", "Why?", "--system", "Be brief.", "-e", endpoint)
    run("generate", "--raw", "Once", "-e", endpoint, "--top-k", "4", "--top-p", "0.9", "--repetition-penalty", "1.2")
    run("generate", "-e", endpoint, stdin="From a pipe\n")
    chat, raw, piped = node.requests
    assert [m.role for m in chat.chat.messages] == ["system", "user"]
    assert (raw.text, raw.sampling.top_k, raw.sampling.top_p) == ("Once", 4, 0.9)
    assert piped.chat.messages[0].content == "From a pipe\n"
    assert run("generate", "--raw", "x", "--system", "y", "-e", endpoint).code == 1


def test_generate_json_is_one_document(run: Run, endpoint: str) -> None:
    ran = run("generate", "Why?", "-e", endpoint, "--json")
    document = json.loads(ran.out)
    assert (document["text"], document["finish_reason"], document["seed"]) == ("Hello", "stop_string", 7)
    assert document["usage"]["decode"] == {
        "hits": 30, "misses": 10, "loaded_bytes": 1 << 20, "stall_s": 0.25, "hit_rate": 0.75,
    }  # fmt: skip
    assert ran.err == ""


def test_failures_are_one_sentence_with_the_mend(run: Run, endpoint: str, node: ScriptedInference) -> None:
    node.scripts = [(InvalidInput("temperature is 9; allowed: 0 to 5"),)]
    refused = run("generate", "x", "-e", endpoint)
    assert (refused.code, refused.err) == (1, "error: temperature is 9; allowed: 0 to 5\n")
    away = run("generate", "x", "-e", "unix:/nowhere/n.sock")
    assert away.code == 1
    assert re.fullmatch(
        r"error: There is no connection to unix:/nowhere/n\.sock \(.*\)\. Start the stack with `promoe up`, .*\n",
        away.err,
    )
    empty = run("generate", stdin="  \n")
    assert (empty.code, empty.out) == (1, "")
    assert "The prompt is empty" in empty.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate", "x", "--max-tokens", "many"), 2, "--max-tokens"),
        (("generate", "x", "--max-tokens", "-1"), 2, "max_tokens is -1"),
        (("up", "--memory", "8Gx"), 2, "'8Gx' is not a size"),
        (("up", "--link-bytes-per-s", "fast"), 2, "'fast' is not a rate"),
        (("up", "--set", "compute.cache_rate"), 2, "is not of the form section.key=value"),
        (("up", "--set", "cpu.x=1"), 2, "[cpu] is not a section"),
        (("up", "--config", "/no/such.toml"), 2, "There is no configuration file /no/such.toml"),
        (("up", "--listen", "nonsense"), 1, "'nonsense' is not an address"),
        (("up", "/no/such/model"), 1, "There is no folder /no/such/model, and it is not a hub id"),
        (("pack",), 2, "promoe pack MODEL DIR"),
        (("pack", "a", "b", "--verify", "c"), 2, "--verify takes a pack's folder and nothing else"),
        (("pack", "a", "b", "--demo-wheel", "c"), 2, "--demo-wheel is for the model `demo` only"),
        (("unknown",), 2, "unknown"),
    ],
)
def test_wrong_usage_names_what_is_wrong(run: Run, arguments: tuple[str, ...], code: int, words: str) -> None:
    ran = run(*arguments)
    assert ran.code == code
    assert words in " ".join(ran.err.replace("│", " ").split())


def test_up_refuses_a_run_folder_and_a_port_in_use(run: Run, folder: Path, endpoint: str) -> None:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    taken = run("up", str(checkpoint), "--listen", endpoint)
    assert taken.code == 1
    assert f"{endpoint} cannot be listened on (Address already in use); give another --listen." in taken.err
    with RunDir(folder / "run").hold():
        held = run("up", str(checkpoint), "--listen", "127.0.0.1:0")
    assert held.code == 1
    assert "promoe is already running in" in held.err


def test_a_running_stack_is_found_without_flags(run: Run, folder: Path, endpoint: str) -> None:
    run_dir = RunDir(folder / "run")
    with run_dir.hold():
        run_dir.write_state(StackState(4242, "ready", endpoint, run_dir.store_endpoint, "demo", "/p", time.time()))
        assert run("generate", "Why?").out == "Hello\n"
        ran = run("status")
    assert ran.code == 0
    words = " ".join(ran.out.split())
    assert re.search(r"stack ready, up [\d.]+ \w+ \(process 4242\)", words)
    assert "tiny (mixtral): 4 MoE layers × 8 experts, 2 per token, 32.0 MiB in bfloat16" in words
    assert "decode hit rate 75.0 % (30 hits, 10 misses), 20 tokens in 20 steps" in words
    assert "store frozen" in words
    assert "trouble There is no connection to unix:/x" in words, "the node's store, not the stack's"


def test_status_without_a_stack_fails_and_says_so(run: Run) -> None:
    ran = run("status", "-e", "unix:/nowhere/n.sock")
    assert ran.code == 1
    assert "none was started here" in ran.out
    document = json.loads(run("status", "--json", "-e", "unix:/nowhere/n.sock").out)
    assert (document["node"], document["stack"]) == (None, None)
    assert "no connection" in document["troubles"][0]


def test_status_json_has_the_counters(run: Run, endpoint: str) -> None:
    document = json.loads(run("status", "--json", "-e", endpoint).out)
    assert document["node"]["model"]["dtype"] == "bfloat16"
    assert document["cache"]["decode"]["hit_rate"] == 0.75
    assert document["cache"]["layers"][0]["evictions"] == 9


def test_chat_in_a_pipe_keeps_the_history_until_reset(run: Run, endpoint: str, node: ScriptedInference) -> None:
    questions = "First?\n\nSecond?\n/reset\n/what\nThird?\n/quit\nnever asked\n"
    ran = run("chat", "-e", endpoint, "--system", "Be brief.", "-n", "5", stdin=questions)
    assert (ran.code, ran.out) == (0, "Hello\nHello\nHello\n")
    assert [[m.content for m in request.chat.messages] for request in node.requests] == [
        ["Be brief.", "First?"],
        ["Be brief.", "First?", "Hello", "Second?"],
        ["Be brief.", "Third?"],
    ]
    assert ran.err.count("TTFT") == 3
    assert "/what is no command" in ran.err
    assert {request.sampling.max_tokens for request in node.requests} == {5}


def test_chat_in_a_pipe_ends_with_the_first_failure(run: Run, endpoint: str, node: ScriptedInference) -> None:
    node.scripts = [(InvalidInput("too long"),), HELLO]
    ran = run("chat", "-e", endpoint, stdin="a\nb\n")
    assert (ran.code, ran.out) == (1, "")
    assert "error: too long" in ran.err


def test_chat_on_a_terminal(endpoint: str, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("Once upon", 1), Act.HANG), (InvalidInput("too long"),), HELLO]
    with on_terminal("chat", "-e", endpoint) as (terminal, process):
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for("› ")
        terminal.send("Tell me\n")
        terminal.wait_for("Once upon")
        terminal.send("\x03")
        terminal.wait_for("(stopped)")
        assert node.hung_up.wait(DEADLINE_S)
        terminal.wait_for("› ", times=2)
        terminal.send("Too much\n")
        terminal.wait_for("too long")
        terminal.wait_for("› ", times=3)
        terminal.send("half a line")
        terminal.wait_for("half a line")
        terminal.press_until("\x03", "› ", times=4)
        terminal.send("Again\n")
        terminal.wait_for("TTFT")
        terminal.wait_for("› ", times=5)
        terminal.send("\x04")
        assert process.wait(DEADLINE_S) == 0
    assert [m.content for m in node.requests[-1].chat.messages] == ["Tell me", "Once upon", "Again"]


def test_generate_on_a_terminal_is_cancelled_by_ctrl_c(endpoint: str, node: ScriptedInference) -> None:
    node.scripts = [(accepted(), delta("Once upon", 1), Act.HANG)]
    with on_terminal("generate", "x", "-e", endpoint) as (terminal, process):
        terminal.wait_for("Once upon")
        terminal.send("\x03")
        assert process.wait(DEADLINE_S) != 0
    assert node.hung_up.wait(DEADLINE_S)
    assert "Traceback" not in terminal.screen


def test_a_reader_that_has_gone_is_no_error(endpoint: str) -> None:
    promoe = [sys.executable, "-c", "from promoe.cli.app import main; main()"]
    command = f"{shlex.join([*promoe, 'generate', 'x', '-e', endpoint])} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, "it noticed"
    assert "Traceback" not in ended.stderr
    assert "error" not in ended.stderr


def test_help_is_quick_and_knows_every_command() -> None:
    begin_s = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from promoe.cli.app import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - begin_s < 5  # it takes a third of a second on an idle machine
    for command in ("up", "generate", "chat", "status", "top", "pack", "demo", "doctor", "--install-completion"):
        assert command in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "promoe.cli.app" in imported
    assert imported.isdisjoint({"torch", "transformers", "numpy"})


def test_shell_completion_offers_the_commands() -> None:
    environment = {**os.environ, "_PROMOE_COMPLETE": "complete_bash", "COMP_WORDS": "promoe st", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("promoe")
    ended = subprocess.run([script], capture_output=True, text=True, env=environment, check=False)
    assert "status" in ended.stdout.split()


def test_a_failure_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(PermissionError(errno.EACCES, "Permission denied", "/some/file"))
    print_error(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == "error: Permission denied: /some/file\nerror: No space left on device\n"


def test_a_folder_for_packs_that_cannot_be_made_is_told_with_the_mend(run: Run, folder: Path) -> None:
    (folder / "home").write_text("a file where a folder should be")
    (folder / "checkpoint").mkdir()
    ran = run("up", str(folder / "checkpoint"), "--listen", "127.0.0.1:0")
    assert ran.code == 1
    assert f"error: Packs cannot be kept in {folder}/home/packs (" in ran.err
    assert "set PROMOE_HOME to a folder for them" in ran.err


def test_version(run: Run) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").out)


def test_pack_becomes_the_packer(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from promoe.cli.app import main; main()", "pack", "--verify", str(folder / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert str(folder / "none") in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("builder_status", "status"), [(0, 0), (3, 1)])
def test_packing_the_demo_model_builds_it_first(folder: Path, builder_status: int, status: int) -> None:
    modules = folder / "modules" / "expert_store"
    modules.mkdir(parents=True)
    build = f"print('r1') if sys.argv[1:] == ['--release'] else sys.exit({builder_status})"
    (modules / "demo_model.py").write_text(f"import sys\n{build}\n")
    (modules / "pack.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    ended = subprocess.run(
        [sys.executable, "-c", "from promoe.cli.app import main; main()", "pack", "demo", "DIR", "--dtype", "float32"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(modules.parent), "PROMOE_HOME": str(folder)},
    )
    assert ended.returncode == status, ended.stderr
    packed = f"{folder / 'models' / 'demo-r1'} DIR --dtype float32\n"
    assert ended.stdout == (packed if builder_status == 0 else "")
    assert ("failed with exit code 3" in ended.stderr) == (builder_status == 3)
