"""Commands and answers arrive as they were sent; anything else is refused with a sentence."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from predictor_service.learner.control import (
    Answer,
    AskStatus,
    CandidateTrained,
    Command,
    ControlLines,
    KnowVersions,
    LearnerStatus,
    Pause,
    Train,
    TrainingFailed,
    decode_answer,
    decode_command,
    encode_answer,
    encode_command,
)
from promoe.errors import InvalidInput, Unavailable
from promoe.hint import ObservedKind


@pytest.fixture
def ends() -> Iterator[tuple[ControlLines, ControlLines]]:
    one, other = map(ControlLines, socket.socketpair())
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize(
    "command",
    [
        Train(Path("/a/b@1.safetensors"), "b@2"),
        Train(None, "b@2"),
        Pause(True),
        Pause(False),
        AskStatus(),
        KnowVersions({"a@1": ObservedKind.ROUTER_INPUT, "b@1": ObservedKind.NONE}),
    ],
)
def test_commands_come_as_they_are_sent(command: Command) -> None:
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(
    "answer",
    [
        LearnerStatus(9, 5, 70, 1234, 2.5, 1, 0, False, True, 640, 2),
        CandidateTrained("/out/a@1.safetensors", {"held_out_loss": 0.5}),
        TrainingFailed("The disk is full."),
    ],
)
def test_answers_come_as_they_are_sent(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize(
    "line",
    [b"", b"no", b"[]", b"{}", b'{"a": 1, "b": 2}', b'{"halt": true}', b'{"train": {"name": "x@1"}}', b'{"train": 1}',
     b'{"pause": 1}', b'{"status": false}', b'{"versions": {"a@1": "everything"}}', b'{"train": {"base": 1}}'],
)  # fmt: skip
def test_what_is_no_command_is_refused(line: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_command(line)


@pytest.mark.parametrize("line", [b"no", b'{"status": {"x": 1}}', b'{"trained": {"path": 1}}', b'{"failed": 1}',
                                  b'{"trained": {"path": "a", "metrics": {"b": "c"}}}'])  # fmt: skip
def test_what_is_no_answer_is_refused(line: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode_answer(line)


def test_lines_are_put_together_again(ends: tuple[ControlLines, ControlLines]) -> None:
    one, other = ends
    lines = [encode_command(Pause(True)), encode_command(AskStatus())]
    text = b"".join(lines)
    one.send(text[:5])
    assert list(other.receive()) == []
    one.send(text[5:])
    assert [line + b"\n" for line in other.receive()] == lines


def test_an_endless_line_is_refused(ends: tuple[ControlLines, ControlLines]) -> None:
    one, other = ends
    with pytest.raises(InvalidInput, match="longer than"):  # noqa: PT012 (it may be any of them)
        for _ in range(1000):
            one.send(b"x" * 4096)
            assert list(other.receive()) == []


def test_the_other_side_s_end_is_told(ends: tuple[ControlLines, ControlLines]) -> None:
    one, other = ends
    one.close()
    with pytest.raises(Unavailable):
        list(other.receive())
    with pytest.raises(Unavailable):
        other.send(b"x\n")
