"""The store as a process: what it refuses to start with, how it ends, and several nodes on one arena."""

import os
import queue
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expert_store.arena import ArenaLayout
from promoe.errors import EXIT_PACK_DAMAGED, PackDamaged
from promoe.fd_channel import FdOp, receive_packet
from promoe.ids import ExpertId
from promoe.pack_manifest import PackManifest, layer_file
from promoe.rpc import domain_error
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION
from tests.packs import flip_bit, write_synthetic_pack
from tests.running_store import ROOT, RunningStore, wait_until
from tests.system.node_process import NodeProcess, arena_nbytes, checksum_of_pack

MIB = 1 << 20


@pytest.fixture
def manifest(socket_dir: Path) -> PackManifest:
    return write_synthetic_pack(socket_dir / "pack")


def run_to_end(pack_dir: Path, folder: Path, *settings: str) -> tuple[int, str]:
    """Starts a store that is expected to end by itself; its status and what it wrote."""
    with RunningStore(pack_dir, folder, *settings) as store:
        status = store.process.wait(timeout=30)
        text = store.log.read_text()
        assert "Traceback" not in text
        return status, text


def test_a_damaged_pack_is_refused_with_file_and_expert(socket_dir: Path, manifest: PackManifest) -> None:
    flip_bit(socket_dir / "pack", ExpertId(1, 2), manifest)
    status, text = run_to_end(socket_dir / "pack", socket_dir)
    assert status == EXIT_PACK_DAMAGED
    assert "layer_00001.bin: the blob of L1E2 is damaged" in text
    assert "did not verify; reading it once more" in text


def test_a_truncated_pack_is_refused_before_anything_is_read(socket_dir: Path, manifest: PackManifest) -> None:
    os.truncate(layer_file(socket_dir / "pack", 0), 5000)
    status, text = run_to_end(socket_dir / "pack", socket_dir)
    assert status == EXIT_PACK_DAMAGED
    assert f"has 5000 bytes where the manifest implies {4 * manifest.spec.layout.blob_stride_nbytes}" in text


def test_half_a_pack_and_no_pack_are_told_apart(socket_dir: Path, manifest: PackManifest) -> None:
    (socket_dir / "pack" / "manifest.json").unlink()
    status, text = run_to_end(socket_dir / "pack", socket_dir)
    assert (status, "not a finished pack" in text) == (EXIT_PACK_DAMAGED, True)
    status, text = run_to_end(socket_dir / "no such pack", socket_dir)
    assert (status, "There is no folder" in text) == (1, True)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("store.fill_threads=0", "store.fill_threads is 0; allowed"),
        ("store.speed=3", "store.speed is not a setting; known in [store]: "),
        ("store.arena_kind=hugetlb", "store.arena_kind is 'hugetlb'; allowed: memfd"),
        ("store.metrics_listen=nowhere", "store.metrics_listen is 'nowhere'; expected host:port"),
        ("store.metrics_listen=127.0.0.1:70000", "store.metrics_listen is '127.0.0.1:70000'; expected host:port"),
        ("log.level=loud", "log.level is 'loud'; allowed"),
    ],
)
def test_a_wrong_setting_ends_with_status_2(
    setting: str, sentence: str, socket_dir: Path, manifest: PackManifest
) -> None:
    status, text = run_to_end(socket_dir / "pack", socket_dir, setting)
    assert status == 2
    assert sentence in text


def test_an_arena_larger_than_the_machine_is_refused_with_the_number(socket_dir: Path) -> None:
    """The pack is sparse: 8 TiB of holes."""
    pack_dir = socket_dir / "pack"
    small = write_synthetic_pack(pack_dir, layers=1, experts=2, hidden=8, expert_hidden=8)
    spec = small.spec
    huge = type(spec.layout).of(spec.layout.dtype, {"gate_up_proj": (1 << 20, 1 << 20)})
    grown = type(spec)(**{**vars(spec), "layout": huge})
    type(small)(**{**vars(small), "spec": grown}).write(pack_dir)
    os.truncate(layer_file(pack_dir, 0), ArenaLayout.of(grown).blob_stride_nbytes * 2)
    status, text = run_to_end(pack_dir, socket_dir)
    assert status == 1
    assert "The arena needs 8192.13 GiB, but" in text
    assert "GiB are short" in text


def test_a_second_store_in_the_same_folder_is_refused_and_hurts_nobody(
    socket_dir: Path, manifest: PackManifest
) -> None:
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        uuid = store.wait_until_full().arena.uuid
        status, text = run_to_end(socket_dir / "pack", socket_dir)
        assert status == 1
        assert f"Another expert store (pid {store.process.pid}) holds {store.run_dir}/store.lock" in text
        assert store.get_info().arena.uuid == uuid
        with NodeProcess(store, manifest.spec, socket_dir / "node.log") as node:
            assert node.wait_until_attached().ask("checksum") == checksum_of_pack(manifest.spec)


def test_a_second_store_on_the_same_socket_is_refused(socket_dir: Path, manifest: PackManifest) -> None:
    other = socket_dir / "other"
    other.mkdir()
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        uuid = store.wait_until_full().arena.uuid
        status, text = run_to_end(socket_dir / "pack", other, f"store.listen={store.endpoint}")
        assert status == 1
        assert "store.sock" in text
        assert store.get_info().arena.uuid == uuid


def test_sockets_of_a_dead_store_are_replaced(socket_dir: Path, manifest: PackManifest) -> None:
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        store.wait_until_full()
        store.kill()
        assert store.fd_socket.exists()
    with RunningStore(socket_dir / "pack", socket_dir) as successor:
        successor.wait_until_full()
        assert successor.terminate() == 0
    assert not successor.fd_socket.exists()


def test_a_config_file_serves_and_is_overridden(socket_dir: Path, manifest: PackManifest) -> None:
    config = socket_dir / "promoe.toml"
    config.write_text(f'[store]\npack = "/nowhere"\nrun_dir = "{socket_dir}/run"\n[compute]\ncache_rate = 0.5\n')
    command = [sys.executable, "-m", "expert_store", "--config", str(config), "--set", f"store.pack={socket_dir}/pack"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Every expert is published." in line:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_sigterm_ends_the_store_at_once_in_every_phase(socket_dir: Path, manifest: PackManifest) -> None:
    large = write_synthetic_pack(socket_dir / "large", layers=2, experts=4, expert_hidden=512, hidden=512)
    assert large.spec.experts_nbytes > 16 * MIB
    with RunningStore(socket_dir / "large", socket_dir, "store.fill_threads=1") as filling:
        filling.wait_until_serving()
        assert filling.terminate() == 0
    with RunningStore(socket_dir / "pack", socket_dir) as attached:
        attached.wait_until_full()
        with NodeProcess(attached, manifest.spec, socket_dir / "node.log") as node:
            node.wait_until_attached()
            assert attached.terminate() == 0
            node.wait_for_state("frozen")
            os.kill(node.pid, signal.SIGSTOP)
            with RunningStore(socket_dir / "pack", socket_dir, "store.adopt_wait_s=3600") as adopting:
                assert adopting.wait_until_serving().fill_state == pb.FILL_STATE_ADOPTING
                assert adopting.terminate() == 0


def test_a_store_that_waits_for_its_arena_is_not_healthy_and_tells_who_waits_why_it_fails(
    socket_dir: Path, manifest: PackManifest
) -> None:
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        store.wait_until_full()
        with NodeProcess(store, manifest.spec, socket_dir / "node.log") as node:
            node.wait_until_attached()
            store.kill()
            os.kill(node.pid, signal.SIGSTOP)
            flip_bit(socket_dir / "pack", ExpertId(0, 1), manifest)
            with RunningStore(socket_dir / "pack", socket_dir, "store.adopt_wait_s=2") as adopting:
                assert adopting.wait_until_serving().fill_state == pb.FILL_STATE_ADOPTING
                assert not adopting.get_info().HasField("arena")
                with grpc.insecure_channel(adopting.endpoint) as channel:
                    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
                    service = model_pb2.ServiceInfo(schema_version=SCHEMA_VERSION, instance_id="a test")
                    hello = pb.AttachRequest(hello=pb.AttachHello(service=service))
                    requests: queue.SimpleQueue[pb.AttachRequest] = queue.SimpleQueue()
                    requests.put(hello)
                    with pytest.raises(grpc.RpcError) as caught:
                        list(pb_grpc.ExpertStoreStub(channel).Attach(iter(requests.get, None), timeout=20))
                    requests.put(hello)
                assert isinstance(domain_error(caught.value), PackDamaged)
                assert "layer_00000.bin: the blob of L0E1 is damaged" in str(domain_error(caught.value))
                assert adopting.process.wait(timeout=20) == EXIT_PACK_DAMAGED


def test_two_nodes_share_one_copy_of_the_experts(socket_dir: Path) -> None:
    manifest = write_synthetic_pack(socket_dir / "pack", layers=4, experts=8, expert_hidden=256, hidden=512)
    spec = manifest.spec
    data_nbytes = spec.num_blobs * spec.layout.blob_stride_nbytes
    assert data_nbytes >= 48 * MIB
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        store.wait_until_full()
        in_memory = allocated_nbytes(store)
        assert data_nbytes <= in_memory <= data_nbytes + MIB
        with (
            NodeProcess(store, spec, socket_dir / "first.log") as first,
            NodeProcess(store, spec, socket_dir / "second.log") as second,
        ):
            for node in (first, second):
                node.wait_until_attached()
                assert node.ask("checksum") == checksum_of_pack(spec)
            pids = (store.process.pid, first.pid, second.pid)
            assert all(arena_nbytes(pid, "Rss") >= data_nbytes for pid in pids), "all three map all of it"
            proportional = sum(arena_nbytes(pid, "Pss") for pid in pids)
            assert data_nbytes <= proportional <= data_nbytes + 2 * MIB, "and together they have it once"
            assert allocated_nbytes(store) == in_memory, "attaching took no memory of its own"
            assert anonymous_nbytes(store.process.pid) <= 150 * MIB
            assert {lease.pid for lease in store.stats().leases} == {first.pid, second.pid}


def arena_link(store: RunningStore) -> Path:
    """The store's own descriptor of its arena, under /proc."""
    for link in Path(f"/proc/{store.process.pid}/fd").iterdir():
        try:
            if "memfd:promoe-arena" in str(link.readlink()):
                return link
        except FileNotFoundError:  # a descriptor that was closed meanwhile, of a connection that ended
            continue
    raise AssertionError("the store holds its arena")


def allocated_nbytes(store: RunningStore) -> int:
    """Shared memory that the arena takes of the machine, whoever maps it."""
    return arena_link(store).stat().st_blocks * 512


def anonymous_nbytes(pid: int) -> int:
    """What the process holds beside shared mappings and files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_a_killed_node_loses_its_lease_and_the_next_one_attaches(socket_dir: Path, manifest: PackManifest) -> None:
    with RunningStore(socket_dir / "pack", socket_dir) as store:
        store.wait_until_full()
        for _ in range(2):
            with NodeProcess(store, manifest.spec, socket_dir / "node.log") as node:
                node.wait_until_attached()
                assert [lease.pid for lease in store.stats().leases] == [node.pid]
            wait_until(lambda: not store.stats().leases, log=store.log)
        assert "Traceback" not in store.log.read_text()


def test_a_stopped_node_keeps_its_blob_and_holds_up_nobody_else(socket_dir: Path, manifest: PackManifest) -> None:
    with RunningStore(socket_dir / "pack", socket_dir, "store.scrub_interval_s=0.05") as store:
        store.wait_until_full()
        with (
            NodeProcess(store, manifest.spec, socket_dir / "stopped.log") as stopped,
            NodeProcess(store, manifest.spec, socket_dir / "awake.log") as awake,
        ):
            stopped.wait_until_attached()
            awake.wait_until_attached()
            os.kill(stopped.pid, signal.SIGSTOP)
            damage_through_proc(store, ArenaLayout.of(manifest.spec), ExpertId(0, 1))
            wait_until(lambda: awake.ask("events") == "8 1")
            assert "withdrawn L0E1" in awake.ask("checksum")
            assert store.stats().retired_blobs == 1
            os.kill(stopped.pid, signal.SIGCONT)
            wait_until(lambda: awake.ask("events") == stopped.ask("events") == "9 1", log=store.log)
            for node in (awake, stopped):
                assert node.ask("checksum") == checksum_of_pack(manifest.spec)


def damage_through_proc(store: RunningStore, layout: ArenaLayout, expert: ExpertId) -> None:
    """Flips a bit in the store's arena through its own descriptor."""
    fd = os.open(arena_link(store), os.O_RDWR)
    offset = layout.offset_of(layout.index_of(expert)) + 9
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte ^ 1]), offset)
    os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_strangers_process_gets_no_arena(socket_dir: Path, manifest: PackManifest) -> None:
    with RunningStore(socket_dir / "pack", socket_dir, "store.allowed_uids=4242") as store:
        store.wait_until_full()
        assert ask_as_user(store, 4343) == (FdOp.REFUSED, "User 4343 may not attach to this store")
        assert ask_as_user(store, 4242)[0] is FdOp.ARENA
        assert "Refused process" in store.log.read_text()


def ask_as_user(store: RunningStore, uid: int) -> tuple[FdOp, str]:
    """Says hello under another user id, through a socket that was opened to everybody for it."""
    store.fd_socket.chmod(0o666)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(20)
    program = f"""
import os, socket
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.chdir({str(store.run_dir)!r})
os.setuid({uid})
channel.connect("arena.sock")
channel.send(b'{{"op": "hello", "arena_uuid": "", "node_instance_id": "x", "reason": ""}}')
report = socket.socket(fileno={far.fileno()})
report.send(channel.recv(4096))
"""
    with near, far:
        subprocess.run([sys.executable, "-c", program], pass_fds=[far.fileno()], check=True, timeout=20)
        packet, _ = receive_packet(near)
    return packet.op, packet.reason.partition(";")[0]
