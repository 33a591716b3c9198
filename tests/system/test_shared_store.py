"""Two compute nodes on one store: both answer at once and right, and the experts are in memory once."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from expert_store.arena import ArenaLayout
from promoe.model_spec import ModelSpec
from promoe.node_report import NodeInfo
from promoe.pack_manifest import PackManifest
from tests.running_node import RunningNode
from tests.running_store import RunningStore, wait_until
from tests.system.node_process import arena_nbytes
from tests.system.test_exactness import demo_prompts, oracle

MIB = 1 << 20
NUM_TOKENS = 10
SLOTS = (4, 16)
"""Expert slots per layer of the two nodes; the model has 32 experts."""


def anonymous_nbytes(pid: int) -> int:
    """What the process holds of its own: neither files nor shared memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@dataclass(frozen=True)
class Pair:
    """A store and two nodes, and what each node held of its own before there was a store to attach to."""

    spec: ModelSpec
    store: RunningStore
    nodes: tuple[RunningNode, RunningNode]
    before_nbytes: tuple[int, int]


@pytest.fixture(scope="module")
def pair(demo_pack_fp32: Path, module_socket_dir: Path) -> Iterator[Pair]:
    """The nodes come first and wait, so that what attaching and serving takes can be told from what loading takes."""
    folder = module_socket_dir
    endpoint = f"unix:{folder}/run/store.sock"
    settings = ("compute.max_context_tokens=128", "compute.max_concurrent_requests=1")
    first, second = (
        RunningNode(demo_pack_fp32, endpoint, folder, f"compute.expert_slots={slots}", *settings, name=f"node-{slots}")
        for slots in SLOTS
    )
    with first, second:
        for node in (first, second):
            log = node.log
            wait_until(lambda log=log: "The expert store cannot be attached" in log.read_text(), 180, log)  # type: ignore[misc]
        before = (anonymous_nbytes(first.process.pid), anonymous_nbytes(second.process.pid))
        with RunningStore(demo_pack_fp32, folder) as store:
            yield Pair(PackManifest.read(demo_pack_fp32).spec, store, (first, second), before)


def test_both_answer_at_once_with_the_same_tokens(pair: Pair, demo_checkpoint: Path) -> None:
    prompts = demo_prompts(demo_checkpoint)[:2]
    expected = oracle(demo_checkpoint, prompts, NUM_TOKENS)

    def ask(node: RunningNode) -> tuple[NodeInfo, list[list[int]]]:
        with node.client() as client:
            answers = [client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True) for prompt in prompts]
            return client.info(), [list(answer.token_ids) for answer in answers]

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(ask, pair.nodes))
    for slots, (info, tokens) in zip(SLOTS, answers, strict=True):
        assert tokens == expected
        assert info.expert_cache.slots_per_layer == slots
        assert info.store.arena_uuid == pair.store.get_info().arena.uuid
    pids = {node.process.pid for node in pair.nodes}
    assert {lease.pid for lease in pair.store.stats().leases} == pids


def test_the_experts_are_in_memory_once(pair: Pair) -> None:
    """After both have served. PSS shares each page out among those who map it: the sum counts it once."""
    data_nbytes = pair.spec.num_blobs * pair.spec.layout.blob_stride_nbytes
    assert data_nbytes > 100 * MIB, "large beside what else these processes hold"
    pids = [pair.store.process.pid, *(node.process.pid for node in pair.nodes)]
    for node in pair.nodes:
        node.endpoint()
    assert all(arena_nbytes(pid, "Rss") >= data_nbytes for pid in pids), "all three map all of it"
    proportional_nbytes = sum(arena_nbytes(pid, "Pss") for pid in pids)
    assert data_nbytes <= proportional_nbytes <= ArenaLayout.of(pair.spec).nbytes + MIB, (
        "and together they have it once"
    )


def test_a_node_holds_its_slots_and_no_second_copy(pair: Pair) -> None:
    """What a node has of its own grows by its slots, its KV blocks and some workspace, far from the experts' size."""
    layer_slot_nbytes = pair.spec.num_moe_layers * pair.spec.layout.blob_stride_nbytes
    grown = []
    for node, before_nbytes in zip(pair.nodes, pair.before_nbytes, strict=True):
        node.endpoint()
        grown.append(anonymous_nbytes(node.process.pid) - before_nbytes)
    for slots, grown_nbytes in zip(SLOTS, grown, strict=True):
        assert grown_nbytes >= slots * layer_slot_nbytes, "the slots are there"
        assert grown_nbytes <= slots * layer_slot_nbytes + pair.spec.experts_nbytes * 2 // 3, "and not the experts"
    difference_nbytes = (SLOTS[1] - SLOTS[0]) * layer_slot_nbytes
    assert abs(grown[1] - grown[0] - difference_nbytes) <= difference_nbytes // 2, "the cache rate decides"
    assert anonymous_nbytes(pair.store.process.pid) <= 150 * MIB, "the store has the arena and little else"
