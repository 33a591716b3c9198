"""The expert store's contract: a real server process, the real client, and peers that keep to no contract."""

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compute_node.fd_client import HeldArena, request_arena
from compute_node.store_client import AttachProgress, StoreClient, StoreState
from promoe.arena import SharedMapping
from promoe.errors import DeadlineExceeded, InvalidInput, ModelMismatch, PromoeError, Unavailable
from promoe.fd_channel import FdOp, FdPacket, receive_packet, send_packet
from promoe.ids import ExpertId
from promoe.pack_manifest import PackManifest
from promoe.rpc import domain_error
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION, encode_spec
from tests.node_doubles import RecordingListener, RecordingPinning, ignore_progress, read_blob
from tests.packs import synthetic_blob, write_synthetic_pack
from tests.running_store import RunningStore, wait_until

EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]


@pytest.fixture(scope="module")
def folder(module_socket_dir: Path) -> Path:
    return module_socket_dir


@pytest.fixture(scope="module")
def manifest(folder: Path) -> PackManifest:
    return write_synthetic_pack(folder / "pack")


@pytest.fixture(scope="module")
def store(folder: Path, manifest: PackManifest) -> Iterator[RunningStore]:
    """One store for the module, that checks its arena all the time."""
    with RunningStore(folder / "pack", folder, "store.scrub_interval_s=0.05") as running:
        running.wait_until_full()
        yield running
        assert running.process.poll() is None, running.log.read_text()
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture
def pinning() -> RecordingPinning:
    return RecordingPinning()


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def client(
    store: RunningStore, manifest: PackManifest, pinning: RecordingPinning, listener: RecordingListener
) -> Iterator[StoreClient]:
    attached = StoreClient(store.endpoint, manifest.spec.fingerprint, pinning, listener)
    attached.attach(20, ignore_progress)
    yield attached
    attached.close()
    attached.close()
    assert pinning.registered == {}
    wait_until(lambda: attached.instance_id not in leases(store), log=store.log)


def leases(store: RunningStore) -> dict[str, int]:
    return {lease.node_instance_id: lease.pid for lease in store.stats().leases}


def test_an_attached_node_reads_every_expert_from_registered_memory(
    client: StoreClient, store: RunningStore, manifest: PackManifest, pinning: RecordingPinning
) -> None:
    assert client.state is StoreState.ATTACHED
    for expert in EXPERTS:
        assert read_blob(client, expert, manifest.spec) == synthetic_blob(0, expert, manifest.spec.layout.blob_nbytes)
        assert pinning.covers(client.source_address(expert), manifest.spec.layout.blob_nbytes)
    assert leases(store)[client.instance_id] == os.getpid()


def test_info_and_statistics_tell_what_is_there(
    client: StoreClient, store: RunningStore, manifest: PackManifest
) -> None:
    info, stats = store.get_info(), store.stats()
    assert info.model == encode_spec(manifest.spec)
    assert info.arena.uuid == client.arena_uuid
    assert (info.arena.kind, info.fill_state) == ("memfd", pb.FILL_STATE_FULL)
    assert info.filled_bytes == info.total_bytes == manifest.spec.experts_nbytes
    assert info.fd_socket == str(store.fd_socket)
    assert (stats.published_blobs, stats.retired_blobs, stats.adopted) == (8, 0, False)
    assert stats.arena_bytes == info.arena.size_bytes
    assert stats.fill_s > 0
    assert stats.fill_bytes_per_s > 0


def test_progress_rises_to_the_whole(store: RunningStore, manifest: PackManifest) -> None:
    reports: list[AttachProgress] = []
    client = StoreClient(store.endpoint, None, RecordingPinning(), RecordingListener())
    client.attach(20, reports.append)
    client.close()
    assert reports[-1].filled_nbytes == reports[-1].total_nbytes == manifest.spec.experts_nbytes
    assert reports[-1].registered_nbytes >= manifest.spec.experts_nbytes
    assert [r.registered_nbytes for r in reports] == sorted(r.registered_nbytes for r in reports)
    with pytest.raises(Unavailable, match="not attached"):
        client.source_address(ExpertId(0, 0))


def test_health_says_serving(store: RunningStore) -> None:
    with grpc.insecure_channel(store.endpoint) as channel:
        for service in ("", "promoe.v1.ExpertStore"):
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_node_for_another_model_does_not_start(store: RunningStore, manifest: PackManifest) -> None:
    client = StoreClient(store.endpoint, "feedface", RecordingPinning(), RecordingListener())
    with pytest.raises(ModelMismatch) as caught:
        client.attach(20, ignore_progress)
    assert "feedface" in str(caught.value)
    assert manifest.spec.fingerprint in str(caught.value)


def test_a_store_that_is_not_there_is_named_when_the_deadline_passes(socket_dir: Path) -> None:
    client = StoreClient(f"unix:{socket_dir}/none.sock", None, RecordingPinning(), RecordingListener())
    with pytest.raises(DeadlineExceeded, match=r"none\.sock had not published every expert after 0\.2 s\. Last: "):
        client.attach(0.2, ignore_progress)


def test_a_damaged_blob_is_withdrawn_mended_and_never_changed_under_a_reader(
    client: StoreClient, store: RunningStore, manifest: PackManifest, listener: RecordingListener
) -> None:
    expert = ExpertId(1, 1)
    blob = synthetic_blob(0, expert, manifest.spec.layout.blob_nbytes)
    address = client.source_address(expert)
    offset = damage_in_arena(store, expert)
    listener.may_retire.clear()
    listener.wait_for("retiring", expert)
    with pytest.raises(Unavailable, match="withdrawn L1E1"):
        client.source_address(expert)
    assert read_blob(client, ExpertId(1, 0), manifest.spec)
    assert arena_byte(store, offset) == blob[0] ^ 1, "the store wrote while the node had not let go"
    assert store.stats().retired_blobs == 1
    listener.may_retire.set()
    listener.wait_for("published", expert, times=2)
    assert client.source_address(expert) == address
    assert read_blob(client, expert, manifest.spec) == blob
    stats = store.stats()
    assert (stats.published_blobs, stats.retired_blobs, stats.damaged_blobs) == (8, 0, 1)


def damage_in_arena(store: RunningStore, expert: ExpertId) -> int:
    """Flips a bit of the blob's first byte from outside; returns the blob's offset."""
    arena = store.get_info().arena
    offset = arena.data_offset + EXPERTS.index(expert) * arena.blob_stride_bytes
    mapping = map_arena(store)
    mapping.view[offset] ^= 1
    mapping.close()
    return int(offset)


def arena_byte(store: RunningStore, offset: int) -> int:
    mapping = map_arena(store)
    byte = mapping.view[offset]
    mapping.close()
    return byte


def map_arena(store: RunningStore) -> SharedMapping:
    packet, fd = request_arena(str(store.fd_socket), "a test", None)
    assert packet.op is FdOp.ARENA
    assert fd is not None
    mapping = SharedMapping(fd, os.fstat(fd).st_size)
    os.close(fd)
    return mapping


def test_the_descriptor_is_handed_out_only_where_it_is_needed(client: StoreClient, store: RunningStore) -> None:
    assert client.arena_uuid is not None
    with Path(os.devnull).open() as file:
        same, fd = request_arena(str(store.fd_socket), "a test", HeldArena(client.arena_uuid, file.fileno()))
        assert (same.op, fd) == (FdOp.SAME, None)
        other, fd = request_arena(str(store.fd_socket), "a test", HeldArena("f" * 32, file.fileno()))
        assert (other.op, other.arena_uuid) == (FdOp.ARENA, client.arena_uuid)
        assert fd is not None
        os.close(fd)


def hello(**changes: str) -> pb.AttachRequest:
    service = model_pb2.ServiceInfo(
        version="0", schema_version=changes.get("schema", SCHEMA_VERSION), instance_id=changes.get("instance", "test")
    )
    return pb.AttachRequest(hello=pb.AttachHello(service=service, fingerprint=changes.get("fingerprint", ""), pid=1))


def ack(layer: int, generation: int = 1) -> pb.AttachRequest:
    return pb.AttachRequest(
        retire_ack=pb.RetireAck(expert=model_pb2.ExpertId(layer=layer, expert=0), generation=generation)
    )


@pytest.mark.parametrize(
    ("requests", "error", "sentence"),
    [
        ([], InvalidInput, "first message of Attach must be a hello"),
        ([ack(0)], InvalidInput, "first message of Attach must be a hello"),
        ([pb.AttachRequest()], InvalidInput, "first message of Attach must be a hello"),
        ([hello(instance="")], InvalidInput, "lacks service.instance_id"),
        ([hello(schema="9.0")], ModelMismatch, r"the compute node speaks schema 9\.0"),
        ([hello(fingerprint="feedface")], ModelMismatch, "feedface"),
        ([hello(), hello()], InvalidInput, "acknowledgements only"),
        ([hello(), ack(99)], InvalidInput, "L99E0"),
    ],
)
def test_a_stream_that_breaks_the_protocol_is_ended_with_the_reason(
    requests: list[pb.AttachRequest], error: type[PromoeError], sentence: str, store: RunningStore
) -> None:
    with grpc.insecure_channel(store.endpoint) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            for _ in pb_grpc.ExpertStoreStub(channel).Attach(iter(requests), timeout=10):
                pass
        found = domain_error(caught.value)
        with pytest.raises(error, match=sentence):
            raise found
    wait_until(lambda: "test" not in leases(store), log=store.log)


def test_acknowledging_what_was_not_withdrawn_changes_nothing(store: RunningStore) -> None:
    with grpc.insecure_channel(store.endpoint) as channel:
        answers = list(pb_grpc.ExpertStoreStub(channel).Attach(iter([hello(), ack(0), ack(1, 7)]), timeout=10))
    assert [answer.WhichOneof("event") for answer in answers] == ["table"]
    assert answers[0].table.complete
    assert store.stats().published_blobs == 8


def connect(store: RunningStore) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(10)
    channel.connect(str(store.fd_socket))
    return channel


@pytest.mark.parametrize(
    "payload", [b"\0", b"\xff" * 3000, b"[" * 4000, b'{"op": "hello"}', b'{"op": 3}', b"x" * 10_000, b"null"]
)
def test_garbage_on_the_descriptor_socket_is_refused_and_hurts_nobody(payload: bytes, store: RunningStore) -> None:
    with connect(store) as channel:
        channel.send(payload)
        packet, fd = receive_packet(channel)
        assert (packet.op, fd) == (FdOp.REFUSED, None)
    map_arena(store).close()


def test_peers_that_say_nothing_hold_up_nobody(store: RunningStore) -> None:
    silent = [connect(store) for _ in range(20)]
    for channel in silent[:10]:
        channel.close()
    map_arena(store).close()
    for channel in silent[10:]:
        channel.close()


@pytest.mark.parametrize("op", [FdOp.ADOPT, FdOp.ARENA, FdOp.OFFER])
def test_an_arena_that_nobody_asked_for_is_not_taken(op: FdOp, store: RunningStore) -> None:
    before = store.get_info().arena.uuid
    with connect(store) as channel, Path(os.devnull).open() as file:
        send_packet(channel, FdPacket(op, "f" * 32, "a test"), file.fileno())
        packet, _ = receive_packet(channel)
        assert packet.op is FdOp.REFUSED
    assert store.get_info().arena.uuid == before


def test_garbage_on_the_grpc_socket_hurts_nobody(store: RunningStore, client: StoreClient) -> None:
    for payload in (b"\0" * 5000, b"GET / HTTP/1.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(store.endpoint.removeprefix("unix:"))
            channel.sendall(payload)
    assert store.stats().published_blobs == 8
    assert client.state is StoreState.ATTACHED


def test_both_sockets_are_closed_to_strangers(store: RunningStore) -> None:
    for path in (store.fd_socket, Path(store.endpoint.removeprefix("unix:"))):
        assert path.stat().st_mode & 0o777 == 0o660


def test_closing_while_attaching_ends_the_thread(store: RunningStore) -> None:
    before = threading.active_count()
    for _ in range(5):
        client = StoreClient(store.endpoint, None, RecordingPinning(), RecordingListener())
        client.attach(20, ignore_progress)
        client.close()
    wait_until(lambda: threading.active_count() <= before + 1)


def test_the_metrics_page_shows_the_figures(folder: Path, manifest: PackManifest, socket_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = f"store.metrics_listen=127.0.0.1:{port}"
    with RunningStore(folder / "pack", socket_dir, settings) as store:
        store.wait_until_full()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        samples = {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name != "#"}
        assert samples["promoe_arena_filled_bytes"] == manifest.spec.experts_nbytes
        assert samples["promoe_arena_bytes"] == store.stats().arena_bytes
        assert samples["promoe_damaged_blobs_total"] == 0
        assert samples["promoe_leases"] == 0
        assert samples["promoe_fill_seconds"] > 0
        (socket_dir / "second").mkdir()
        with RunningStore(folder / "pack", socket_dir / "second", settings) as second:
            assert second.process.wait(timeout=20) == 1
            assert f"cannot listen on 127.0.0.1:{port}" in second.log.read_text()
        assert store.terminate() == 0
