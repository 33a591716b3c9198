"""A predictor process takes over from another while answers are on their way: no stream ends, the tokens are the quiet
ones.

Every process is real but those that talk nonsense. The oracle is the same answer before there was a predictor.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from promoe import Client
from promoe.errors import InternalError, InvalidInput, ModelNotFound, PromoeError
from promoe.node_admin import NodeAdmin
from promoe.node_report import HintStats, PredictorLink, PredictorState
from promoe.pack_manifest import PackManifest
from tests.packs import write_synthetic_pack
from tests.promoe.command_line import CommandLine
from tests.running_predictor import RunningPredictor
from tests.running_store import wait_until
from tests.scripted_predictor import ScriptedPredictor
from tests.system.test_predictor_faults import all_kinds_of_nonsense
from tests.system.tiny_stack import BackgroundAnswer, TinyStack, quiet_answer, running_stack

NUM_TOKENS = 100
FEWER_TOKENS = 40
NUM_STREAMS = 8


@dataclass(frozen=True)
class Serving:
    """A node whose predictors are about to be replaced."""

    stack: TinyStack
    client: Client
    folder: Path
    quiet: list[int]

    @property
    def admin(self) -> NodeAdmin:
        return NodeAdmin(self.stack.node.endpoint())

    @property
    def link(self) -> PredictorLink:
        return self.client.info().predictor

    @property
    def hints(self) -> HintStats:
        return self.client.cache_stats().hints

    def open_predictor(self, name: str, predictor: str = "gate_ahead") -> RunningPredictor:
        (self.folder / name).mkdir(exist_ok=True)
        return RunningPredictor(self.stack.pack_dir, self.folder / name, f"predictor.predictor={predictor}")

    def answers(self, num_tokens: int = NUM_TOKENS) -> list[BackgroundAnswer]:
        return [BackgroundAnswer(self.client, num_tokens=num_tokens) for _ in range(NUM_STREAMS)]

    def check(self, answers: list[BackgroundAnswer], num_tokens: int = NUM_TOKENS) -> None:
        """No stream was interrupted, and none noticed anything."""
        assert [answer.tokens() for answer in answers] == [self.quiet[:num_tokens]] * NUM_STREAMS

    def wait_for_hints(self) -> None:
        """Until some more were taken, or nobody is served any more."""
        before = self.hints.taken
        wait_until(lambda: self.hints.taken > before or self.client.cache_stats().running_requests == 0, 60)


@pytest.fixture(scope="module")
def serving(tiny_pack: Path, module_socket_dir: Path) -> Iterator[Serving]:
    config = module_socket_dir / "promoe.toml"
    write_config(config, "unix:/nowhere/first.sock")
    settings = "compute.expert_slots=4"
    with running_stack(tiny_pack, module_socket_dir, settings, config=config) as stack, stack.client() as client:
        yield Serving(stack, client, module_socket_dir, quiet_answer(client, num_tokens=NUM_TOKENS))
        assert stack.node.process.poll() is None


def write_config(path: Path, endpoint: str, **others: object) -> None:
    lines = ["[compute]", f'predictor_endpoint = "{endpoint}"', *(f"{key} = {value}" for key, value in others.items())]
    path.write_text("\n".join(lines) + "\n")


def test_under_load_another_takes_over_and_the_old_one_may_die_or_the_new_one(serving: Serving) -> None:
    with serving.open_predictor("old") as old, serving.open_predictor("new", "transition") as new:
        for predictor in (old, new):
            predictor.wait_until_serving()
        serving.admin.connect_predictor(old.endpoint, "the test", "")
        answers = serving.answers()
        serving.wait_for_hints()
        before = serving.hints
        switch = serving.admin.connect_predictor(new.endpoint, "the test", "under load")
        assert switch is not None
        assert (switch.before, switch.after, switch.why) == (old.endpoint, new.endpoint, "under load")
        assert not any(answer.is_done for answer in answers), "it happened under load"
        serving.wait_for_hints()
        link = serving.link
        assert (link.endpoint, link.previous, link.candidate) == (new.endpoint, old.endpoint, "")
        assert link.last_switch == switch
        assert serving.hints.withheld > before.withheld, "it was warmed up beside the old one"
        assert serving.hints.invalid == before.invalid

        new.kill()  # in its first minute
        wait_until(lambda: serving.link.endpoint == old.endpoint, 30)
        returned = serving.link.last_switch
        assert returned is not None
        assert returned.is_return
        assert "failed on trial" in returned.why
        assert not any(answer.is_done for answer in answers), "so did this"
        wait_until(lambda: serving.link.state is PredictorState.CONNECTED)
        serving.wait_for_hints()
        serving.check(answers)
        assert "by the wish of the node itself" in serving.stack.node.log.read_text()

        with serving.open_predictor("third", "frequency") as third:
            third.wait_until_serving()
            answers = serving.answers(FEWER_TOKENS)
            serving.wait_for_hints()
            serving.admin.connect_predictor(third.endpoint, "the test", "")
            old.kill()
            serving.wait_for_hints()
            serving.check(answers, FEWER_TOKENS)
            link = serving.link
            assert (link.endpoint, link.state) == (third.endpoint, PredictorState.CONNECTED)
            assert link.last_switch is not None
            assert not link.last_switch.is_return


def speaks_garbage(path: Path) -> "subprocess.Popen[bytes]":
    """A process that says the same to everybody."""
    script = (
        "import socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()\n"
        "while True:\n"
        "    connection, _ = listener.accept(); connection.sendall(b'\\0garbage' * 999); connection.close()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    wait_until(path.exists)
    return process


def test_who_may_not_take_over_changes_nothing(serving: Serving) -> None:
    (serving.folder / "other").mkdir()
    write_synthetic_pack(serving.folder / "other/pack", layers=5)
    spec = PackManifest.read(serving.stack.pack_dir).spec
    nonsense = f"unix:{serving.folder / 'nonsense.sock'}"
    garbage = serving.folder / "garbage.sock"

    def refusal(endpoint: str) -> PromoeError:
        with pytest.raises(PromoeError) as refused:
            serving.admin.connect_predictor(endpoint, "the test", "")
        return refused.value

    with (
        serving.open_predictor("old") as old,
        serving.open_predictor("stopped") as stopped,
        RunningPredictor(serving.folder / "other/pack", serving.folder / "other") as other,
        ScriptedPredictor(nonsense, spec, all_kinds_of_nonsense),
    ):
        for predictor in (old, stopped, other):
            predictor.wait_until_serving()
        serving.admin.connect_predictor(old.endpoint, "the test", "")
        speaker = speaks_garbage(garbage)
        stopped.process.send_signal(signal.SIGSTOP)
        answers = serving.answers(FEWER_TOKENS)
        try:
            assert "fingerprint" in str(refusal(other.endpoint))
            assert isinstance(refusal(nonsense), InternalError)
            assert isinstance(refusal(f"unix:{garbage}"), PromoeError)
            assert isinstance(refusal("unix:/nowhere/at.all"), ModelNotFound)
            assert isinstance(refusal("127.0.0.1:1"), ModelNotFound)
            assert isinstance(refusal("what is this"), InvalidInput)
            assert isinstance(refusal(stopped.endpoint), ModelNotFound)
        finally:
            speaker.kill()
            speaker.wait()
            stopped.process.send_signal(signal.SIGCONT)
        link = serving.link
        assert (link.endpoint, link.candidate, link.state) == (old.endpoint, "", PredictorState.CONNECTED)
        serving.check(answers, FEWER_TOKENS)


def test_a_changed_configuration_and_a_person_do_the_same(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(tmp_path, monkeypatch, capsys).run
    config = serving.folder / "promoe.toml"

    def reload(text: str) -> None:
        length = len(serving.stack.node.log.read_text())
        serving.stack.node.process.send_signal(signal.SIGHUP)
        wait_until(lambda: text in serving.stack.node.log.read_text()[length:], 30)

    with serving.open_predictor("asked") as asked, serving.open_predictor("typed") as typed:
        for predictor in (asked, typed):
            predictor.wait_until_serving()
        reload("nothing has changed")
        write_config(config, asked.endpoint, max_queued_requests=3, num_threads=2)
        reload("has taken over")
        assert serving.link.endpoint == asked.endpoint
        log = serving.stack.node.log.read_text()
        assert "not while the node serves: compute.max_queued_requests." in log, "what --set says is not in the file"
        config.write_text("[compute]\nno_such_key = 1\n")
        reload("no_such_key")
        config.write_text("[compute\n")
        reload("is not TOML")
        node = ("--node", serving.stack.node.endpoint())
        done = run("predictor", "connect", typed.endpoint, *node, "--why", "to see")
        before = f"before it was {asked.endpoint}"
        assert done.out == f"The node at {node[1]} listens to {typed.endpoint} now; {before}.\n"
        assert "listens to" in run("predictor", "connect", typed.endpoint, *node).out
        assert serving.link.endpoint == typed.endpoint
        shown = run("status", "-e", node[1]).out
        assert "on trial" in shown
        refused = run("predictor", "connect", "unix:nowhere.sock", *node)
        assert refused.code == 1
        assert f"unix:{Path.cwd()}/nowhere.sock" in refused.err
        assert "Traceback" not in refused.err
        assert quiet_answer(serving.client, num_tokens=FEWER_TOKENS) == serving.quiet[:FEWER_TOKENS]
