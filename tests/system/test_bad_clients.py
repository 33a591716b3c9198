"""Clients that ask for nonsense, talk nonsense, ask too much or go away: what they are told, and that nobody notices.

Each test has an answer on its way for somebody else, whose tokens must be those of a quiet node.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from promoe import Client
from promoe.errors import InvalidInput, Overloaded
from promoe.generation import FinishReason
from promoe.rpc import CHANNEL_OPTIONS
from tests.running_store import ROOT, wait_until
from tests.system.tiny_stack import (
    NUM_TOKENS,
    PROMPT,
    BackgroundAnswer,
    TinyStack,
    quiet_answer,
    running_stack,
)

GENERATE = "/promoe.v1.Inference/Generate"
LONG_PROMPT = "in the sand "
LONG_ANSWER = 200
"""Tokens of an answer that takes ten seconds: what ends sooner was ended."""


@pytest.fixture(scope="module")
def stack(tiny_pack: Path) -> Iterator[TinyStack]:
    settings = ("compute.max_concurrent_requests=2", "compute.max_queued_requests=1")
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        running_stack(tiny_pack, Path(folder), *settings) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def expected(stack: TinyStack) -> list[int]:
    with stack.client() as client:
        return quiet_answer(client)


@pytest.fixture
def client(stack: TinyStack) -> Iterator[Client]:
    with stack.client() as connected:
        yield connected
        wait_until(lambda: num_running(connected) == 0)


def num_running(client: Client) -> int:
    return client.cache_stats().running_requests


def raw_generate(endpoint: str, message: bytes) -> grpc.RpcError:
    """The failure of a Generate call whose message is these bytes."""
    with grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_stream(GENERATE, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as failure:
            list(call(message, timeout=30))
    return failure.value


def test_nonsense_is_refused_while_others_are_answered(stack: TinyStack, client: Client, expected: list[int]) -> None:
    answer = BackgroundAnswer(client).in_the_middle()
    asks: dict[str, Callable[[], object]] = {
        r"prompt has 10000000 bytes or more; allowed: at most 4194304": lambda: client.complete("x" * 10_000_000),
        r"prompt has 4194304 tokens; allowed: fewer than the context's 256": lambda: client.complete("x" * (4 << 20)),
        r"prompt.token_ids has 3000000 entries; allowed: at most 256": lambda: client.complete([7] * 3_000_000),
        r"token_ids has 10000; allowed: 0 to": lambda: client.complete([7, 10_000]),
        r"prompt is empty": lambda: client.complete(""),
        r"temperature is nan; allowed: 0 to 5": lambda: client.complete(PROMPT, temperature=float("nan")),
    }
    for sentence, ask in asks.items():
        with pytest.raises(InvalidInput, match=sentence):
            ask()
    unknown = raw_generate(stack.node.endpoint(), b"\x0a\x01x\xa2\x06\x01x")
    assert unknown.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request has unknown field numbers [100]" in str(unknown.details())
    assert answer.tokens() == expected


def garbage() -> list[bytes]:
    """What ports get to hear: noise, other protocols, and HTTP/2 that ends or goes wrong after its preface."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    noise = random.Random(7)
    return [
        noise.randbytes(100_000),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise.randbytes(506),
        preface[:10],
        preface + b"\xff\xff\xff" + noise.randbytes(1000),
        preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + noise.randbytes(1000),
        b"",
    ]


def test_garbage_on_the_port_is_heard_by_nobody(stack: TinyStack, client: Client, expected: list[int]) -> None:
    answer = BackgroundAnswer(client).in_the_middle()
    host, _, port = stack.node.endpoint().rpartition(":")
    with ExitStack() as connections:
        for payload in garbage() * 5:
            connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=20))
            # Thrown out in the middle of its speech, maybe.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(payload)
        broken = raw_generate(stack.node.endpoint(), b"\xff" * 50)
        assert broken.code() is grpc.StatusCode.UNKNOWN, "gRPC's own word for a message that is none"
        assert "Error parsing message with type 'promoe.v1.GenerateRequest'" in str(broken.details())
        assert answer.tokens() == expected
    assert quiet_answer(client, num_tokens=3) == expected[:3]


def client_process(endpoint: str, num_tokens: int = LONG_ANSWER) -> "subprocess.Popen[str]":
    """Another process that prints a long answer as it comes; returns when it has printed something."""
    program = (
        "import sys; from promoe import Client\n"
        "stream = Client(sys.argv[1]).generate(sys.argv[2], max_tokens=int(sys.argv[3]), ignore_eos=True)\n"
        "for delta in stream.deltas():\n"
        "    print(len(delta.token_ids), flush=True)\n"
    )
    command = [sys.executable, "-c", program, endpoint, LONG_PROMPT, str(num_tokens)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def leave_by_cancel(stack: TinyStack) -> None:
    with stack.client() as leaver:
        answer = BackgroundAnswer(leaver, LONG_PROMPT, LONG_ANSWER).in_the_middle()
        answer.stream.cancel()
        assert 3 <= len(answer.tokens()) < LONG_ANSWER
        assert answer.stream.finish_reason is FinishReason.CANCELLED


def leave_by_closing_the_channel(stack: TinyStack) -> None:
    leaver = stack.client()
    answer = BackgroundAnswer(leaver, LONG_PROMPT, LONG_ANSWER).in_the_middle()
    leaver.close()
    with pytest.raises(Exception, match=r"[Cc]hannel|[Cc]ancel|connection"):
        answer.tokens()


def leave_by_dying(stack: TinyStack) -> None:
    with client_process(stack.node.endpoint()) as process:
        process.kill()


@pytest.mark.parametrize("leave", [leave_by_cancel, leave_by_closing_the_channel, leave_by_dying])
def test_who_goes_away_stops_being_computed_and_disturbs_nobody(
    leave: Callable[[TinyStack], None], stack: TinyStack, client: Client, expected: list[int]
) -> None:
    leave(stack)
    num_steps = client.cache_stats().decode.steps
    wait_until(lambda: num_running(client) == 0)
    assert client.cache_stats().decode.steps - num_steps <= 2, "gone within a step"

    answer = BackgroundAnswer(client).in_the_middle()
    leave(stack)
    wait_until(lambda: num_running(client) <= 1)
    assert answer.tokens() == expected


def test_a_client_that_does_not_read_holds_up_nobody(stack: TinyStack, client: Client, expected: list[int]) -> None:
    with client_process(stack.node.endpoint(), 2 * NUM_TOKENS) as process:
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert quiet_answer(client) == expected
            wait_until(lambda: num_running(client) == 0, timeout_s=60)
            assert quiet_answer(client) == expected
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert process.stdout is not None
        assert len(process.stdout.readlines()) == 2 * NUM_TOKENS - 1, "it has lost nothing"
        assert process.wait(20) == 0


def test_too_many_are_told_to_come_again_and_all_that_were_accepted_are_answered(
    stack: TinyStack, client: Client, expected: list[int]
) -> None:
    running = [BackgroundAnswer(client).in_the_middle() for _ in range(2)]
    waiting = BackgroundAnswer(client)
    wait_until(lambda: client.cache_stats().queued_requests == 1)
    with pytest.raises(Overloaded, match=r"2 requests are running and 1 are waiting") as refusal:
        quiet_answer(client)
    assert refusal.value.retry_after_ms >= 100
    assert waiting.token_ids == []
    with Client(stack.node.endpoint()) as patient:  # retries, as the refusal says
        assert quiet_answer(patient) == expected
    for answer in (*running, waiting):
        assert answer.tokens() == expected
        assert len(answer.token_ids) == NUM_TOKENS


def test_the_node_has_seen_no_failure_of_its_own(stack: TinyStack, client: Client, expected: list[int]) -> None:
    """The last test of this module: after all of the above the node is as it was."""
    assert quiet_answer(client) == expected
    text = stack.node.log.read_text()
    assert "Internal error" not in text
    assert " failed" not in text
