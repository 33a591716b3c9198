"""The store's client against a store that does everything a store can do, right and wrong."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from compute_node.store_client import AttachProgress, StoreClient, StoreState
from promoe.arena import ARENA_KINDS, ArenaHeader, SharedMapping
from promoe.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelMismatch,
    PackDamaged,
    PromoeError,
    Unavailable,
)
from promoe.fd_channel import FdOp, FdPacket
from promoe.ids import ExpertId
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import model_pb2
from tests.node_doubles import RecordingListener, RecordingPinning, ignore_progress
from tests.promoe.specs import small_spec
from tests.running_store import wait_until
from tests.scripted_store import ScriptedStore

SPEC = small_spec()
STRIDE = SPEC.layout.blob_stride_nbytes
DATA_OFFSET = 8192
NBYTES = DATA_OFFSET + SPEC.num_blobs * STRIDE
UUID, OTHER_UUID = "a" * 32, "b" * 32
EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]


def make_arena(uuid: str) -> int:
    """A sealed arena whose blobs' first bytes are their places, counted from 1."""
    fd = ARENA_KINDS["memfd"].create(NBYTES)
    mapping = SharedMapping(fd, NBYTES)
    header = ArenaHeader(uuid, SPEC.fingerprint, SPEC.num_blobs, NBYTES, DATA_OFFSET, STRIDE).encode()
    mapping.view[: len(header)] = header
    for index in range(SPEC.num_blobs):
        mapping.view[DATA_OFFSET + index * STRIDE] = index + 1
    mapping.close()
    return fd


@pytest.fixture
def arena_fd() -> Iterator[int]:
    fd = make_arena(UUID)
    yield fd
    os.close(fd)


@pytest.fixture
def store(socket_dir: Path, arena_fd: int) -> Iterator[ScriptedStore]:
    with ScriptedStore(socket_dir, SPEC) as scripted:
        scripted.fd_answers = [(FdPacket(FdOp.ARENA, UUID), arena_fd)]
        yield scripted


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def client(store: ScriptedStore, listener: RecordingListener) -> Iterator[StoreClient]:
    made = StoreClient(store.endpoint, None, RecordingPinning(), listener)
    yield made
    made.close()


def locations(experts: list[ExpertId], generation: int = 1) -> list[pb.BlobLocation]:
    return [
        pb.BlobLocation(
            expert=model_pb2.ExpertId(layer=expert.layer, expert=expert.expert),
            offset=DATA_OFFSET + (expert.layer * 3 + expert.expert) * STRIDE,
            nbytes=SPEC.layout.blob_nbytes,
            generation=generation,
        )
        for expert in experts
    ]


def table(experts: list[ExpertId], complete: bool, uuid: str = UUID) -> pb.AttachResponse:
    arena = pb.ArenaInfo(uuid=uuid, kind="memfd", size_bytes=NBYTES, data_offset=DATA_OFFSET, blob_stride_bytes=STRIDE)
    return pb.AttachResponse(table=pb.BlobTable(arena=arena, blobs=locations(experts), complete=complete))


def published(experts: list[ExpertId], complete: bool, generation: int = 1) -> pb.AttachResponse:
    return pb.AttachResponse(published=pb.BlobsPublished(blobs=locations(experts, generation), complete=complete))


def retired(expert: ExpertId) -> pb.AttachResponse:
    wire = model_pb2.ExpertId(layer=expert.layer, expert=expert.expert)
    return pb.AttachResponse(retired=pb.BlobRetired(expert=wire, generation=1, reason="It is damaged."))


def test_attaching_ends_when_the_fill_does_and_tells_of_it(
    store: ScriptedStore, client: StoreClient, listener: RecordingListener
) -> None:
    store.script.put(table(EXPERTS[:2], complete=False))
    reports: list[AttachProgress] = []

    def go_on(progress: AttachProgress) -> None:
        reports.append(progress)
        if progress.filled_nbytes == 2 * SPEC.layout.blob_nbytes:
            assert client.state is StoreState.CONNECTING
            store.script.put(published(EXPERTS[2:], complete=True))

    client.attach(20, go_on)
    assert client.state is StoreState.ATTACHED
    assert [report.filled_nbytes // SPEC.layout.blob_nbytes for report in reports] == [0, 2, 6]
    assert {report.total_nbytes for report in reports} == {SPEC.experts_nbytes}
    assert reports[-1].registered_nbytes == SPEC.num_blobs * STRIDE
    assert sorted(listener.events) == [("published", expert) for expert in EXPERTS]
    hello = store.requests.get(timeout=10).hello
    assert (hello.fingerprint, hello.pid) == (SPEC.fingerprint, os.getpid())
    assert not hello.HasField("arena_uuid")
    assert store.hellos[0].node_instance_id == hello.service.instance_id == client.instance_id


def test_a_withdrawal_is_acknowledged_only_when_nobody_reads_the_blob(
    store: ScriptedStore, client: StoreClient, listener: RecordingListener
) -> None:
    store.script.put(table(EXPERTS, complete=True))
    client.attach(20, ignore_progress)
    store.requests.get(timeout=10)
    listener.may_retire.clear()
    store.script.put(retired(EXPERTS[4]))
    listener.wait_for("retiring", EXPERTS[4])
    with pytest.raises(Unavailable, match="withdrawn L1E1"):
        client.source_address(EXPERTS[4])
    assert store.requests.empty()
    listener.may_retire.set()
    ack = store.requests.get(timeout=10).retire_ack
    assert (ack.expert.layer, ack.expert.expert, ack.generation) == (1, 1, 1)
    store.script.put(published([EXPERTS[4]], complete=True, generation=2))
    listener.wait_for("published", EXPERTS[4], times=2)
    assert client.source_address(EXPERTS[4]) - client.source_address(EXPERTS[0]) == 4 * STRIDE


def test_a_store_without_an_arena_is_asked_again(store: ScriptedStore, client: StoreClient) -> None:
    store.fd_answers = [(FdPacket(FdOp.WAIT), None), (FdPacket(FdOp.WAIT), None), *store.fd_answers]
    store.script.put(table(EXPERTS, complete=True))
    client.attach(20, ignore_progress)
    assert len(store.hellos) == 3


def test_a_broken_stream_freezes_and_comes_back_to_the_same_arena(
    store: ScriptedStore, client: StoreClient, listener: RecordingListener
) -> None:
    store.script.put(table(EXPERTS, complete=True))
    client.attach(20, ignore_progress)
    addresses = [client.source_address(expert) for expert in EXPERTS]
    store.fd_answers = [(FdPacket(FdOp.SAME, UUID), None)]
    store.script.put((grpc.StatusCode.UNAVAILABLE, "The expert store is shutting down."))
    wait_until(lambda: client.state is StoreState.FROZEN)
    assert [client.source_address(expert) for expert in EXPERTS] == addresses
    store.script.put(table(EXPERTS[1:], complete=True))
    wait_until(lambda: client.state is StoreState.ATTACHED)
    assert store.hellos[-1].arena_uuid == UUID
    assert [event for event in listener.events if event[0] == "retired"] == [("retired", EXPERTS[0])]
    assert [client.source_address(expert) for expert in EXPERTS[1:]] == addresses[1:]


def test_an_arena_that_the_store_does_not_want_back_is_let_go(
    store: ScriptedStore, client: StoreClient, listener: RecordingListener
) -> None:
    store.script.put(table(EXPERTS, complete=True))
    client.attach(20, ignore_progress)
    new_fd = make_arena(OTHER_UUID)
    store.fd_answers = [(FdPacket(FdOp.OFFER), None), (FdPacket(FdOp.ARENA, OTHER_UUID), new_fd)]
    store.script.put(None)
    store.script.put(table(EXPERTS, complete=True, uuid=OTHER_UUID))
    for expert in EXPERTS:
        listener.wait_for("published", expert, times=2)
    wait_until(lambda: client.arena_uuid == OTHER_UUID)
    assert [packet.op for packet in store.hellos] == [FdOp.HELLO, FdOp.HELLO, FdOp.ADOPT, FdOp.HELLO]
    assert store.hellos[-1].arena_uuid == "", "it was let go before the new one was asked for"
    os.close(new_fd)


def test_a_store_that_fails_says_why(store: ScriptedStore, client: StoreClient) -> None:
    store.script.put(table(EXPERTS[:1], complete=False))
    store.script.put((grpc.StatusCode.DATA_LOSS, "layer_00001.bin: the blob of L1E2 is damaged."))
    with pytest.raises(PackDamaged, match="L1E2 is damaged"):
        client.attach(20, ignore_progress)


def unsealed_arena() -> int:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, NBYTES)
    return fd


def spoil(store: ScriptedStore, how: str) -> None:
    """Makes the scripted store go wrong in one way; the script has a good table unless it says otherwise."""
    fd = store.fd_answers[0][1]
    if how == "schema":
        store.info.service.schema_version = "9.0"
    elif how == "refusal":
        store.fd_answers = [(FdPacket(FdOp.REFUSED, reason="User 7 may not attach."), None)]
    elif how == "arena without a descriptor":
        store.fd_answers = [(FdPacket(FdOp.ARENA, UUID), None)]
    elif how == "descriptor without an arena":
        store.fd_answers = [(FdPacket(FdOp.SAME, UUID), fd)]
    elif how == "hello":
        store.fd_answers = [(FdPacket(FdOp.HELLO), None)]
    elif how == "unsealed":
        store.fd_answers = [(FdPacket(FdOp.ARENA, UUID), unsealed_arena())]
    elif how == "other arena in the table":
        store.script.get()
        store.script.put(table(EXPERTS, complete=True, uuid=OTHER_UUID))
    elif how == "unknown expert":
        store.script.put(published([ExpertId(0, 3)], complete=True))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "error", "sentence"),
    [
        ("schema", ModelMismatch, r"speaks schema 9\.0"),
        ("refusal", InvalidInput, "refuses this process: User 7 may not attach"),
        ("arena without a descriptor", InvalidInput, "answered arena where it cannot"),
        ("descriptor without an arena", InvalidInput, "answered same where it cannot"),
        ("hello", InvalidInput, "answered hello where it cannot"),
        ("unsealed", InvalidInput, "not sealed"),
        ("other arena in the table", InvalidInput, "header says"),
        ("unknown expert", InvalidInput, "speaks of L0E3"),
    ],
)
def test_what_is_wrong_for_good_ends_the_attach_at_once(
    how: str, error: type[PromoeError], sentence: str, store: ScriptedStore, client: StoreClient
) -> None:
    store.script.put(table(EXPERTS, complete=how != "unknown expert"))
    spoil(store, how)
    with pytest.raises(error, match=sentence):
        client.attach(20, ignore_progress)
    with pytest.raises(Unavailable, match="not attached"):
        client.source_address(EXPERTS[0])
    spoiled_fd = store.fd_answers[0][1]
    if how == "unsealed":
        assert spoiled_fd is not None
        os.close(spoiled_fd)


def test_a_store_that_never_fills_up_is_named_at_the_deadline(store: ScriptedStore, client: StoreClient) -> None:
    store.script.put(table(EXPERTS[:3], complete=False))
    with pytest.raises(DeadlineExceeded, match=r"scripted\.sock had not published every expert after 0\.3 s"):
        client.attach(0.3, ignore_progress)


def test_closing_from_another_thread_ends_the_attach(store: ScriptedStore, client: StoreClient) -> None:
    store.script.put(table(EXPERTS[:3], complete=False))
    closers: list[threading.Thread] = []

    def close_once(progress: AttachProgress) -> None:
        if not closers:
            closers.append(threading.Thread(target=client.close))
            closers[0].start()

    with pytest.raises(Unavailable, match="was closed"):
        client.attach(60, close_once)
    closers[0].join()


def test_a_failing_progress_display_leaves_nothing_mapped(store: ScriptedStore) -> None:
    pinning = RecordingPinning()
    client = StoreClient(store.endpoint, None, pinning, RecordingListener())
    store.script.put(table(EXPERTS, complete=False))

    def fail(progress: AttachProgress) -> None:
        if progress.filled_nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.attach(20, fail)
    assert pinning.registered == {}
    assert client.arena_uuid is None


class BrokenListener(RecordingListener):
    """A bug in whoever reads blobs."""

    def __init__(self, num_sound: int = 0) -> None:
        super().__init__()
        self.num_sound = num_sound

    def blob_published(self, expert: ExpertId) -> None:
        if self.num_sound == 0:
            raise ZeroDivisionError
        self.num_sound -= 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_clients_thread_is_not_waited_out(store: ScriptedStore) -> None:
    client = StoreClient(store.endpoint, None, RecordingPinning(), BrokenListener())
    store.script.put(table(EXPERTS, complete=True))
    with pytest.raises(InternalError, match="thread died"):
        client.attach(60, ignore_progress)
    assert client.state is StoreState.FROZEN


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_after_the_attach_is_told_to_the_node(store: ScriptedStore) -> None:
    died = threading.Event()
    client = StoreClient(store.endpoint, None, RecordingPinning(), BrokenListener(len(EXPERTS)), died.set)
    store.script.put(table(EXPERTS, complete=True))
    client.attach(60, ignore_progress)
    assert client.arena_uuid == UUID
    assert not died.is_set()
    store.script.put(published([EXPERTS[0]], complete=True, generation=2))
    assert died.wait(20)
    assert client.state is StoreState.FROZEN
    client.close()


def test_closing_is_no_death(store: ScriptedStore) -> None:
    died = threading.Event()
    client = StoreClient(store.endpoint, None, RecordingPinning(), RecordingListener(), died.set)
    store.script.put(table(EXPERTS, complete=True))
    client.attach(60, ignore_progress)
    client.close()
    assert not died.is_set()
