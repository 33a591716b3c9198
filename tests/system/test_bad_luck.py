"""What dies, stops or is told to stop while answers are on their way, and what the people who wait for them see.

Every process is real. The oracle is the same answer with nothing happening meanwhile.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_store.arena import ArenaLayout
from promoe import Client
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.node_report import StoreState
from promoe.pack_manifest import PackManifest, layer_file
from promoe.v1 import expert_store_pb2 as pb
from tests.running_node import RunningNode
from tests.running_store import wait_until
from tests.system.tiny_stack import (
    NO_RETRY,
    NODE_SETTINGS,
    NUM_TOKENS,
    BackgroundAnswer,
    TinyStack,
    quiet_answer,
    running_stack,
    wait_for_store_state,
)


@pytest.fixture(scope="module")
def stack(tiny_pack: Path) -> Iterator[TinyStack]:
    """For tests that hurt the store and its pack only, and leave both whole again."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        pack_dir = shutil.copytree(tiny_pack, Path(folder) / "pack")
        with running_stack(pack_dir, Path(folder)) as running:
            yield running
            assert "Traceback" not in running.node.log.read_text()


@pytest.fixture
def client(stack: TinyStack) -> Iterator[Client]:
    with stack.client() as connected:
        yield connected
        assert connected.info().store.state is StoreState.ATTACHED, "the next test finds a whole stack"


@pytest.fixture(scope="module")
def expected(stack: TinyStack) -> list[int]:
    with stack.client() as connected:
        return quiet_answer(connected)


def test_a_killed_store_is_not_noticed_in_the_text_and_is_adopted_when_it_comes_back(
    stack: TinyStack, client: Client, expected: list[int]
) -> None:
    uuid = client.info().store.arena_uuid
    answer = BackgroundAnswer(client).in_the_middle()
    stack.store.kill()
    wait_for_store_state(client, StoreState.FROZEN)
    assert client.info().store.arena_uuid == uuid
    num_before = len(answer.token_ids)
    assert num_before < NUM_TOKENS, "the store was gone before the answer was there"
    assert answer.tokens() == expected

    misses = client.cache_stats().decode.misses
    assert quiet_answer(client) == expected, "whole answers come from the arena of a store that is gone"
    assert client.cache_stats().decode.misses > misses, "and their experts were loaded from there"

    answer = BackgroundAnswer(client).in_the_middle()
    stack.restart_store()
    wait_for_store_state(client, StoreState.ATTACHED)
    assert stack.store.stats().adopted
    assert stack.store.wait_until_full().arena.uuid == uuid == client.info().store.arena_uuid
    assert answer.tokens() == expected
    assert quiet_answer(client) == expected
    assert [lease.pid for lease in stack.store.stats().leases] == [stack.node.process.pid]


def test_a_stopped_store_holds_up_nobody(stack: TinyStack, client: Client, expected: list[int]) -> None:
    answer = BackgroundAnswer(client).in_the_middle()
    os.kill(stack.store.process.pid, signal.SIGSTOP)
    try:
        assert answer.tokens() == expected
        answer = BackgroundAnswer(client).in_the_middle()
    finally:
        os.kill(stack.store.process.pid, signal.SIGCONT)
    assert answer.tokens() == expected
    assert [lease.pid for lease in stack.store.stats().leases] == [stack.node.process.pid]


def test_damage_that_happens_while_the_store_is_away_is_mended_when_it_is_back(
    stack: TinyStack, client: Client, expected: list[int]
) -> None:
    """Nobody verifies the arena meanwhile; the next store does, and the node forgets what it has loaded from there."""
    num_damaged = kill_store_and_damage_a_layer(stack, client)
    assert quiet_answer(client) != expected, "the damage can be seen"
    stack.restart_store()
    wait_until(lambda: stack.store.wait_until_serving().fill_state == pb.FILL_STATE_FULL)
    wait_until(lambda: stack.store.stats().damaged_blobs == num_damaged, log=stack.store.log)
    wait_until(lambda: stack.store.stats().retired_blobs == 0, log=stack.store.log)
    assert stack.store.stats().adopted
    wait_for_store_state(client, StoreState.ATTACHED)
    assert quiet_answer(client) == expected


def test_experts_that_cannot_be_mended_are_never_computed_with(
    stack: TinyStack, client: Client, expected: list[int]
) -> None:
    """Damaged in memory and on disk, they stay withdrawn, over a restart too, until the pack is whole again."""
    num_damaged = kill_store_and_damage_a_layer(stack, client)
    on_disk = layer_file(stack.pack_dir, 1)
    content = on_disk.read_bytes()
    on_disk.write_bytes(bytes(len(content)))
    stack.restart_store()
    wait_until(lambda: stack.store.wait_until_serving().fill_state == pb.FILL_STATE_FULL)
    wait_until(lambda: stack.store.stats().retired_blobs == num_damaged, log=stack.store.log)
    wait_until(lambda: "L1E7 stays withdrawn" in stack.store.log.read_text(), log=stack.store.log)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"L1E\d"):
            quiet_answer(client)
    stack.store.kill()
    wait_for_store_state(client, StoreState.FROZEN)
    on_disk.write_bytes(content)
    stack.restart_store()
    wait_until(lambda: stack.store.wait_until_serving().fill_state == pb.FILL_STATE_FULL)
    wait_until(lambda: stack.store.stats().retired_blobs == 0, log=stack.store.log)
    wait_for_store_state(client, StoreState.ATTACHED)
    assert stack.store.stats().adopted
    assert quiet_answer(client) == expected


def kill_store_and_damage_a_layer(stack: TinyStack, client: Client) -> int:
    """Spoils all experts of MoE layer 1 in the arena that the node keeps; returns how many."""
    spec = PackManifest.read(stack.pack_dir).spec
    layout = ArenaLayout.of(spec)
    stack.store.kill()
    wait_for_store_state(client, StoreState.FROZEN)
    with arena_of(stack.node.process.pid).open("r+b") as arena:
        for expert in range(spec.num_experts):
            arena.seek(layout.offset_of(layout.index_of(ExpertId(1, expert))))
            arena.write(bytes(layout.blob_nbytes // 2))
    return spec.num_experts


def arena_of(pid: int) -> Path:
    """The arena as a process holds it."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return next(link for link in links if "memfd:promoe-arena" in str(link.readlink()))


def test_a_store_that_lost_its_memory_brings_another_arena_and_the_same_tokens(
    stack: TinyStack, client: Client, expected: list[int]
) -> None:
    """Without its state a new store fills anew; the node lets the old arena go and maps the new one."""
    uuid = client.info().store.arena_uuid
    stack.store.kill()
    wait_for_store_state(client, StoreState.FROZEN)
    (stack.store.run_dir / "store.json").unlink()
    stack.restart_store()
    wait_for_store_state(client, StoreState.ATTACHED)
    assert client.info().store.arena_uuid == stack.store.get_info().arena.uuid != uuid
    assert not stack.store.stats().adopted
    assert quiet_answer(client) == expected


def test_a_killed_node_is_unavailable_and_the_next_one_serves_the_same_tokens(
    tiny_pack: Path, socket_dir: Path, expected: list[int]
) -> None:
    with running_stack(tiny_pack, socket_dir) as stack:
        with stack.client() as client:
            answer = BackgroundAnswer(client).in_the_middle()
            dead_pid = stack.node.process.pid
            assert [lease.pid for lease in stack.store.stats().leases] == [dead_pid]
            stack.node.kill()
            with pytest.raises(Unavailable, match=r"There is no connection to 127\.0\.0\.1:\d+"):
                answer.tokens()
            assert answer.token_ids == expected[: len(answer.token_ids)]
        wait_until(lambda: not stack.store.stats().leases, log=stack.store.log)
        endpoint = stack.store.endpoint
        with (
            RunningNode(tiny_pack, endpoint, socket_dir, *NODE_SETTINGS, name="next") as node,
            node.client() as client,
        ):
            assert quiet_answer(client) == expected
            assert [lease.pid for lease in stack.store.stats().leases] == [node.process.pid]
        assert "Traceback" not in stack.store.log.read_text()


def test_sigterm_lets_the_running_answer_end_and_refuses_the_next(
    tiny_pack: Path, socket_dir: Path, expected: list[int]
) -> None:
    with running_stack(tiny_pack, socket_dir) as stack, stack.client() as client:
        answer = BackgroundAnswer(client).in_the_middle()
        stack.node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Draining" in stack.node.log.read_text())
        with pytest.raises(Unavailable, match=r"This compute node is shutting down\."):
            quiet_answer(client)
        assert len(answer.token_ids) < NUM_TOKENS, "it was refused while the other one was running"
        assert answer.tokens() == expected
        assert stack.node.process.wait(60) == 0
        wait_until(lambda: not stack.store.stats().leases, log=stack.store.log)
        assert "Traceback" not in stack.node.log.read_text()


def test_an_answer_that_outlives_the_drain_deadline_is_cancelled_with_a_sentence(
    tiny_pack: Path, socket_dir: Path, expected: list[int]
) -> None:
    settings = ("compute.drain_deadline_s=0.3", "compute.max_concurrent_requests=1")
    with running_stack(tiny_pack, socket_dir, *settings) as stack, stack.client() as client:
        answer = BackgroundAnswer(client).in_the_middle()
        with Client(stack.node.endpoint(), NO_RETRY) as other:
            waiting = BackgroundAnswer(other)
            wait_until(lambda: other.cache_stats().queued_requests == 1)
            assert stack.node.terminate() == 0
            for late in (answer, waiting):
                with pytest.raises(Unavailable, match=r"This compute node is shutting down\."):
                    late.tokens()
        assert waiting.token_ids == []
        assert answer.token_ids == expected[: len(answer.token_ids)]
        assert len(answer.token_ids) < NUM_TOKENS
        text = stack.node.log.read_text()
        assert "Cancelling 2 requests at the drain deadline." in text
        assert "Traceback" not in text
