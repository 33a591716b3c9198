"""The store dies and comes back: nodes serve on, the arena is taken back, and whatever was damaged is mended."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_node.fd_client import request_arena
from compute_node.store_client import AttachProgress, StoreClient, StoreState
from promoe.arena import SharedMapping
from promoe.errors import Unavailable
from promoe.fd_channel import FdOp
from promoe.ids import ExpertId
from promoe.pack_manifest import PackManifest
from promoe.v1 import expert_store_pb2 as pb
from tests.node_doubles import RecordingListener, RecordingPinning, ignore_progress, read_blob
from tests.packs import synthetic_blob, write_synthetic_pack
from tests.running_store import RunningStore, wait_until
from tests.system.node_process import NodeProcess, checksum_of_pack

EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]


@pytest.fixture
def manifest(socket_dir: Path) -> PackManifest:
    return write_synthetic_pack(socket_dir / "pack")


@pytest.fixture
def store(socket_dir: Path, manifest: PackManifest) -> Iterator[RunningStore]:
    with RunningStore(socket_dir / "pack", socket_dir) as running:
        running.wait_until_full()
        yield running


class Node:
    """An attached client with its recording seams."""

    def __init__(self, store: RunningStore, manifest: PackManifest) -> None:
        self.pinning = RecordingPinning()
        self.listener = RecordingListener()
        self.manifest = manifest
        self.client = StoreClient(store.endpoint, manifest.spec.fingerprint, self.pinning, self.listener)
        self.client.attach(20, ignore_progress)
        self.addresses = [self.client.source_address(expert) for expert in EXPERTS]

    def wait_for(self, state: StoreState) -> None:
        wait_until(lambda: self.client.state is state)

    def check_blobs(self) -> None:
        for expert in EXPERTS:
            expected = synthetic_blob(0, expert, self.manifest.spec.layout.blob_nbytes)
            assert read_blob(self.client, expert, self.manifest.spec) == expected

    def map_arena(self, store: RunningStore) -> SharedMapping:
        """A writable mapping of the arena, to play damage."""
        packet, fd = request_arena(str(store.fd_socket), "a test", None)
        assert packet.op is FdOp.ARENA
        assert fd is not None
        mapping = SharedMapping(fd, os.fstat(fd).st_size)
        os.close(fd)
        return mapping


@pytest.fixture
def node(store: RunningStore, manifest: PackManifest) -> Iterator[Node]:
    attached = Node(store, manifest)
    yield attached
    attached.client.close()
    assert attached.pinning.registered == {}


def test_a_killed_store_is_missed_by_nobody_and_takes_its_arena_back(
    socket_dir: Path, store: RunningStore, node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    uuid, registered, num_calls = node.client.arena_uuid, dict(node.pinning.registered), node.pinning.num_calls
    store.kill()
    node.wait_for(StoreState.FROZEN)
    node.check_blobs()
    with RunningStore(socket_dir / "pack", socket_dir) as restarted:
        restarted.wait_until_serving()
        serving_since = time.perf_counter()
        node.wait_for(StoreState.ATTACHED)
        with capsys.disabled():
            os.write(1, f" [re-attached {(time.perf_counter() - serving_since) * 1e3:.0f} ms after serving] ".encode())
        stats = restarted.stats()
        assert stats.adopted
        assert stats.fill_bytes_per_s == 0, "nothing was read again"
        assert stats.published_blobs == 8
        assert restarted.wait_until_full().arena.uuid == uuid == node.client.arena_uuid
        assert [node.client.source_address(expert) for expert in EXPERTS] == node.addresses
        assert (node.pinning.registered, node.pinning.num_calls) == (registered, num_calls)
        assert [event for event in node.listener.events if event[0] == "retired"] == []
        node.check_blobs()
        wait_until(lambda: restarted.stats().verified_blobs == 8)
        assert restarted.stats().damaged_blobs == 0


def test_a_store_that_was_stopped_takes_its_arena_back_too(socket_dir: Path, store: RunningStore, node: Node) -> None:
    uuid = node.client.arena_uuid
    assert store.terminate() == 0
    node.wait_for(StoreState.FROZEN)
    with RunningStore(socket_dir / "pack", socket_dir) as restarted:
        node.wait_for(StoreState.ATTACHED)
        assert restarted.get_info().arena.uuid == uuid
        assert restarted.stats().adopted


def test_a_store_without_living_nodes_fills_at_once(
    socket_dir: Path, store: RunningStore, manifest: PackManifest
) -> None:
    with NodeProcess(store, manifest.spec, socket_dir / "node.log") as process:
        process.wait_until_attached()
        store.kill()
    with RunningStore(socket_dir / "pack", socket_dir, "store.adopt_wait_s=3600") as restarted:
        restarted.wait_until_full()
        assert not restarted.stats().adopted


def test_damage_while_the_store_was_away_is_quarantined_and_mended(
    socket_dir: Path, store: RunningStore, node: Node
) -> None:
    arena = store.get_info().arena
    mapping = node.map_arena(store)
    store.kill()
    node.wait_for(StoreState.FROZEN)
    mapping.view[arena.data_offset + 6 * arena.blob_stride_bytes + 17] ^= 4
    node.listener.may_retire.clear()
    with RunningStore(socket_dir / "pack", socket_dir) as restarted:
        node.listener.wait_for("retiring", EXPERTS[6])
        with pytest.raises(Unavailable, match="L1E2"):
            node.client.source_address(EXPERTS[6])
        node.listener.may_retire.set()
        node.listener.wait_for("published", EXPERTS[6], times=2)
        node.check_blobs()
        stats = restarted.stats()
        assert (stats.adopted, stats.damaged_blobs, stats.published_blobs) == (True, 1, 8)
    assert [event for event in node.listener.events if event[0] == "retired"] == [("retired", EXPERTS[6])]
    mapping.close()


def test_a_torn_directory_entry_is_read_again(socket_dir: Path, store: RunningStore, node: Node) -> None:
    """A store that was killed while it wrote leaves an entry that does not verify; its blob comes from the pack."""
    mapping = node.map_arena(store)
    store.kill()
    node.wait_for(StoreState.FROZEN)
    mapping.view[4096 + 3 * 64 + 5] ^= 1
    with RunningStore(socket_dir / "pack", socket_dir) as restarted:
        node.listener.wait_for("published", EXPERTS[3], times=2)
        restarted.wait_until_full()
        assert restarted.stats().adopted
        node.check_blobs()
    assert [event for event in node.listener.events if event[0] == "retired"] == [("retired", EXPERTS[3])]
    mapping.close()


@pytest.mark.parametrize("spoil", ["header", "state"])
def test_an_arena_that_cannot_be_taken_back_is_let_go_before_the_new_one_is_mapped(
    spoil: str, socket_dir: Path, store: RunningStore, node: Node
) -> None:
    uuid = node.client.arena_uuid
    mapping = node.map_arena(store)
    store.kill()
    node.wait_for(StoreState.FROZEN)
    if spoil == "header":
        mapping.view[20] ^= 1
    else:
        (store.run_dir / "store.json").unlink()
    mapping.close()
    with RunningStore(socket_dir / "pack", socket_dir, "store.adopt_wait_s=1") as restarted:
        node.wait_for(StoreState.ATTACHED)
        assert node.client.arena_uuid == restarted.get_info().arena.uuid != uuid
        node.check_blobs()
        assert not restarted.stats().adopted
    kinds = [event[0] for event in node.listener.events if event[0] != "retiring"]
    assert kinds == ["published"] * 8 + ["retired"] * 8 + ["published"] * 8
    assert node.pinning.num_drains == 1


def test_a_store_of_another_model_is_refused_and_the_node_serves_on(
    socket_dir: Path, store: RunningStore, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    store.kill()
    node.wait_for(StoreState.FROZEN)
    other = write_synthetic_pack(socket_dir / "other", seed=1)
    with RunningStore(socket_dir / "other", socket_dir) as wrong:
        wrong.wait_until_full()
        wait_until(lambda: other.spec.fingerprint in caplog.text)
        assert node.manifest.spec.fingerprint in caplog.text
        assert node.client.state is StoreState.FROZEN
        node.check_blobs()
        assert list(wrong.stats().leases) == []
    with RunningStore(socket_dir / "pack", socket_dir) as right:
        node.wait_for(StoreState.ATTACHED)
        node.check_blobs()
        assert right.process.poll() is None


def test_two_nodes_offer_the_arena_and_both_keep_it(
    socket_dir: Path, store: RunningStore, manifest: PackManifest
) -> None:
    nodes = [Node(store, manifest) for _ in range(3)]
    store.kill()
    for node in nodes:
        node.wait_for(StoreState.FROZEN)
    with RunningStore(socket_dir / "pack", socket_dir) as restarted:
        for node in nodes:
            node.wait_for(StoreState.ATTACHED)
            assert [node.client.source_address(expert) for expert in EXPERTS] == node.addresses
            assert node.pinning.num_calls == 1
        assert len({node.client.arena_uuid for node in nodes}) == 1
        assert len(restarted.stats().leases) == 3
        for node in nodes:
            node.client.close()


def test_a_store_waits_only_so_long_for_a_node_that_is_stopped(
    socket_dir: Path, store: RunningStore, manifest: PackManifest
) -> None:
    """A stopped node can neither hand the arena back nor let go of it; when it runs again it attaches anew."""
    with NodeProcess(store, manifest.spec, socket_dir / "node.log") as process:
        process.wait_until_attached()
        store.kill()
        process.wait_for_state("frozen")
        os.kill(process.pid, signal.SIGSTOP)
        with RunningStore(socket_dir / "pack", socket_dir, "store.adopt_wait_s=0.5") as restarted:
            wait_until(lambda: "waiting up to 0.5 s" in restarted.log.read_text())
            assert restarted.wait_until_full().fill_state == pb.FILL_STATE_FULL
            assert not restarted.stats().adopted
            os.kill(process.pid, signal.SIGCONT)
            process.wait_for_state("attached")
            assert process.ask("checksum") == checksum_of_pack(manifest.spec)


def test_a_store_killed_while_a_node_attaches_is_waited_for(socket_dir: Path) -> None:
    """The node's first attach survives the store's death at any moment of the fill, and ends complete."""
    manifest = write_synthetic_pack(socket_dir / "pack", layers=12, experts=8, expert_hidden=256, hidden=256)
    stores = [RunningStore(socket_dir / "pack", socket_dir, "store.fill_threads=1")]

    def replace_store_once(progress: AttachProgress) -> None:
        if len(stores) == 1:
            stores[0].kill()
            stores.append(RunningStore(socket_dir / "pack", socket_dir))

    client = StoreClient(stores[0].endpoint, None, RecordingPinning(), RecordingListener())
    try:
        client.attach(30, replace_store_once)
        wait_until(lambda: client.state is StoreState.ATTACHED)
        assert stores[1].wait_until_full().arena.uuid == client.arena_uuid
        for layer in range(12):
            expert = ExpertId(layer, 3)
            expected = synthetic_blob(0, expert, manifest.spec.layout.blob_nbytes)
            assert read_blob(client, expert, manifest.spec) == expected
    finally:
        client.close()
        for store in stores:
            store.kill()


@pytest.mark.slow
def test_a_stopped_store_is_missed_by_keepalive_and_found_again(
    socket_dir: Path, store: RunningStore, node: Node
) -> None:
    """Nothing is sent between the two for minutes at a time; a store that hangs must be noticed all the same."""
    uuid = node.client.arena_uuid
    os.kill(store.process.pid, signal.SIGSTOP)
    wait_until(lambda: node.client.state is StoreState.FROZEN, timeout_s=40)
    node.check_blobs()
    os.kill(store.process.pid, signal.SIGCONT)
    wait_until(lambda: node.client.state is StoreState.ATTACHED, timeout_s=40)
    assert node.client.arena_uuid == uuid
    assert [event for event in node.listener.events if event[0] == "retired"] == []
    wait_until(lambda: len(store.stats().leases) == 1)
