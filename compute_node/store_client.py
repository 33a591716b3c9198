"""The expert store's client: a required dependency. Without it the node does not start; once attached, the node
serves on from what it has mapped while the store is away.

    CONNECTING ──all experts published and registered──► ATTACHED ──store away──► FROZEN ──attached again──► ATTACHED

One thread owns the connection, the mapping and the table of addresses.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from typing import Final
from uuid import uuid4

import grpc

from compute_node.arena_mapping import ArenaGeometry
from compute_node.attached_arena import AttachedArena
from compute_node.blob_addresses import BlobListener, BlobPlace
from compute_node.device.seam import HostPinning
from compute_node.fd_client import request_arena
from promoe.errors import DeadlineExceeded, InternalError, ModelMismatch, PromoeError, Unavailable
from promoe.fd_channel import FdOp
from promoe.ids import ExpertId
from promoe.rpc import CHANNEL_OPTIONS, INFO_DEADLINE_S, domain_error
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION, check_schema, decode_expert

logger = logging.getLogger(__name__)

# A channel that is made anew for each try must not inherit the back-off of the one before it.
_CHANNEL_OPTIONS: Final = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))

_FIRST_RETRY_S: Final = 0.02
_LAST_RETRY_S: Final = 0.2
_REFUSED_RETRY_S: Final = 1.0


class StoreState(Enum):
    """See the module's docstring."""

    CONNECTING = "connecting"
    ATTACHED = "attached"
    FROZEN = "frozen"


@dataclass(frozen=True)
class AttachProgress:
    """How far the store's fill and this node's registration are, in bytes of blobs and of registered memory."""

    filled_nbytes: int
    total_nbytes: int
    registered_nbytes: int


class StoreClient:
    """One node's connection to its store.

    Args:
        endpoint: `unix:PATH` or `host:port`.
        fingerprint: of the model this node was started for; None takes what the store has.
        pinning: registers the arena with the device; called from this client's thread.
        listener: is told of withdrawn and published blobs, from this client's thread.
        on_death: called last by this client's thread when a bug ends it: the lease is lost for good then.
    """

    def __init__(
        self,
        endpoint: str,
        fingerprint: str | None,
        pinning: HostPinning,
        listener: BlobListener,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._fingerprint = fingerprint
        self._pinning = pinning
        self._listener = listener
        self._on_death = on_death
        self._info = model_pb2.ServiceInfo(
            version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=uuid4().hex
        )
        self._state = StoreState.CONNECTING
        self._arena: AttachedArena | None = None
        self._blob_nbytes = 0
        self._total_nbytes = 0
        self._retry_s = _FIRST_RETRY_S
        self._reports: queue.SimpleQueue[AttachProgress | PromoeError | None] = queue.SimpleQueue()
        self._last_error: PromoeError | None = None
        self._closing = threading.Event()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name="store-client", daemon=True)

    @property
    def state(self) -> StoreState:
        """Where the connection stands."""
        return self._state

    @property
    def arena_uuid(self) -> str | None:
        """The arena that is mapped."""
        held = self._arena.held if self._arena else None
        return held.uuid if held else None

    @property
    def arena_kind(self) -> str | None:
        """The kind of the arena that is mapped."""
        return self._arena.kind if self._arena else None

    @property
    def instance_id(self) -> str:
        """This client's name in the store's table of leases."""
        return str(self._info.instance_id)

    def attach(self, deadline_s: float, on_progress: Callable[[AttachProgress], None]) -> None:
        """Blocks until every expert is published, mapped and registered.

        Raises:
            ModelMismatch: the store has another model, or speaks another schema.
            PackDamaged, InsufficientMemory, InvalidInput, …: the store cannot serve, or refuses this node.
            DeadlineExceeded: names what was waited for.
        """
        assert self._state is StoreState.CONNECTING, "a client attaches once; it comes back by itself"
        deadline = time.perf_counter() + deadline_s
        self._thread.start()
        with ExitStack() as undo:
            undo.callback(self.close)
            while (report := self._next_report(deadline, deadline_s)) is not None:
                on_progress(report)
            undo.pop_all()

    def source_address(self, expert: ExpertId) -> int:
        """Host address of the expert's blob. One list access, no lock.

        Raises:
            Unavailable: the blob was withdrawn, or there is none yet.
        """
        arena = self._arena
        if arena is None:
            raise Unavailable("The expert store is not attached.")
        return arena.addresses.address_of(expert)

    def close(self) -> None:
        """Ends the lease, unregisters and unmaps; no blob may be in use any more. Closing twice is allowed."""
        self._closing.set()
        self._reports.put(Unavailable("The connection to the expert store was closed."))
        call = self._call
        if call is not None:
            call.cancel()
        if self._thread.is_alive():
            self._thread.join()
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()

    def _next_report(self, deadline: float, deadline_s: float) -> AttachProgress | None:
        try:
            report = self._reports.get(timeout=max(0.0, deadline - time.perf_counter()))
        except queue.Empty:
            cause = f" Last: {self._last_error}" if self._last_error else ""
            raise DeadlineExceeded(
                f"The expert store at {self._endpoint} had not published every expert after {deadline_s:g} s.{cause}"
            ) from None
        if isinstance(report, PromoeError):
            raise report
        return report

    # ---- the client's thread ----

    def _run(self) -> None:
        try:
            self._keep_attached()
        finally:
            if not self._closing.is_set():
                # Only a bug ends here; without its lease the node must not look attached.
                self._state = StoreState.FROZEN
                self._reports.put(InternalError("The store client's thread died; the log has the details."))
                logger.error("The store client's thread died.")
                if self._on_death is not None:
                    self._on_death()

    def _keep_attached(self) -> None:
        while not self._closing.is_set():
            try:
                self._hold_session()
                error: PromoeError = Unavailable("The expert store ended the connection.")
            except PromoeError as failure:
                error = failure
            if self._closing.is_set():
                return
            self._note(error)
            may_mend = isinstance(error, Unavailable | DeadlineExceeded)
            self._closing.wait(self._retry_s if may_mend else _REFUSED_RETRY_S)
            self._retry_s = min(self._retry_s * 1.6, _LAST_RETRY_S)

    def _note(self, error: PromoeError) -> None:
        """Says it once, freezes, and ends a first attach that cannot succeed."""
        if self._state is StoreState.ATTACHED:
            self._state = StoreState.FROZEN
            logger.warning("The expert store is away (%s); serving on from what is mapped.", error)
        elif str(error) != str(self._last_error):
            logger.warning("The expert store cannot be attached: %s", error)
        if self._state is StoreState.CONNECTING and not isinstance(error, Unavailable | DeadlineExceeded):
            self._reports.put(error)
        self._last_error = error

    def _hold_session(self) -> None:
        """One connection, from the handshake until it breaks."""
        try:
            with grpc.insecure_channel(self._endpoint, options=_CHANNEL_OPTIONS) as channel:
                stub = pb_grpc.ExpertStoreStub(channel)
                info = self._get_info(stub)
                arena = self._arena_of(info)
                with self._obtain_fd(arena, info.fd_socket) as fd:
                    self._follow(stub, arena, fd)
        except grpc.RpcError as error:
            raise domain_error(error) from error

    def _get_info(self, stub: pb_grpc.ExpertStoreStub) -> pb.ExpertStoreGetInfoResponse:
        try:
            return stub.GetInfo(pb.ExpertStoreGetInfoRequest(), timeout=INFO_DEADLINE_S)
        except grpc.RpcError as error:
            failure = domain_error(error)
            if isinstance(failure, Unavailable | DeadlineExceeded):
                raise Unavailable(f"No expert store answers at {self._endpoint} ({failure}).") from error
            raise failure from error

    def _arena_of(self, info: pb.ExpertStoreGetInfoResponse) -> AttachedArena:
        """Checks who answers; the first answer decides the model where the node was not told one."""
        check_schema(info.service, f"the expert store at {self._endpoint}")
        model = info.model
        if self._fingerprint is None:
            self._fingerprint = model.fingerprint
        if model.fingerprint != self._fingerprint:
            raise ModelMismatch(
                f"This process was started for the model with fingerprint {self._fingerprint}, but the expert store "
                f"at {self._endpoint} has {model.name} ({model.family}, fingerprint {model.fingerprint})."
            )
        if self._arena is None:
            self._arena = AttachedArena(
                model.fingerprint, model.num_moe_layers, model.num_experts, self._pinning, self._listener
            )
            self._blob_nbytes = model.expert_nbytes
            self._total_nbytes = model.num_moe_layers * model.num_experts * model.expert_nbytes
        self._report(info.filled_bytes)
        return self._arena

    @contextmanager
    def _obtain_fd(self, arena: AttachedArena, fd_socket: str) -> Iterator["_PassedFd"]:
        """The descriptor of an arena that is to be mapped, if it is not the one that is mapped already."""
        packet, fd = request_arena(fd_socket, self.instance_id, arena.held)
        passed = _PassedFd(fd)
        try:
            if packet.op is FdOp.WAIT:
                raise Unavailable("The expert store has no arena yet.")
            if packet.op is FdOp.REFUSED:
                arena.let_go(packet.reason)
                raise Unavailable(f"The expert store did not take its arena back: {packet.reason}")
            if packet.op is FdOp.ARENA:
                # Never two arenas at once: the old one's memory must be free before the new one is pinned.
                arena.let_go("the store came back with another arena")
            yield passed
        finally:
            passed.close()

    def _follow(self, stub: pb_grpc.ExpertStoreStub, arena: AttachedArena, fd: "_PassedFd") -> None:
        """Holds the lease: applies the store's events until the stream ends."""
        requests: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        hello = pb.AttachHello(
            service=self._info,
            fingerprint=self._fingerprint or "",
            arena_uuid=arena.held.uuid if arena.held else None,
            pid=os.getpid(),
        )
        requests.put(pb.AttachRequest(hello=hello))
        # No deadline: the stream is the lease and lasts as long as both sides; keepalive notices a dead peer.
        call = stub.Attach(iter(requests.get, None))
        self._call = call
        try:
            if self._closing.is_set():
                return
            for response in call:
                match response.WhichOneof("event"):
                    case "table":
                        self._take_table(arena, response.table, fd)
                    case "published":
                        arena.take_blobs(_decode_places(response.published.blobs), response.published.complete)
                        self._note_filled(arena, response.published.complete)
                    case "retired":
                        requests.put(self._withdraw(arena, response.retired))
        finally:
            self._call = None
            requests.put(None)
            call.cancel()

    def _take_table(self, arena: AttachedArena, table: pb.BlobTable, fd: "_PassedFd") -> None:
        geometry = ArenaGeometry(
            table.arena.uuid,
            table.arena.kind,
            table.arena.size_bytes,
            table.arena.data_offset,
            table.arena.blob_stride_bytes,
        )
        if arena.held is None:
            arena.map(fd.take(), geometry)
        arena.take_table(geometry, _decode_places(table.blobs), table.complete)
        self._note_filled(arena, table.complete)

    def _withdraw(self, arena: AttachedArena, retired: pb.BlobRetired) -> pb.AttachRequest:
        """Returns the acknowledgement, when nobody reads the blob any more."""
        expert = decode_expert(retired.expert)
        logger.warning("The expert store withdraws %s: %s", expert, retired.reason)
        arena.withdraw(expert)
        return pb.AttachRequest(retire_ack=pb.RetireAck(expert=retired.expert, generation=retired.generation))

    def _note_filled(self, arena: AttachedArena, complete: bool) -> None:
        self._report(arena.num_known * self._blob_nbytes)
        if not complete or self._state is StoreState.ATTACHED:
            return
        withdrawn = ", ".join(map(str, arena.addresses.missing()))
        about: dict[str, object] = {"fields": {"node": self.instance_id}}
        logger.info("Attached to the expert store at %s.", self._endpoint, extra=about)
        if withdrawn:
            logger.warning("Withdrawn by the store at the moment: %s.", withdrawn)
        was_connecting = self._state is StoreState.CONNECTING
        self._state = StoreState.ATTACHED
        self._retry_s = _FIRST_RETRY_S
        self._last_error = None
        if was_connecting:
            # Last: `attach` returns with it.
            self._reports.put(None)

    def _report(self, filled_nbytes: int) -> None:
        if self._state is StoreState.CONNECTING:
            registered_nbytes = self._arena.registered_nbytes if self._arena else 0
            self._reports.put(AttachProgress(filled_nbytes, self._total_nbytes, registered_nbytes))


class _PassedFd:
    """A descriptor that is closed unless somebody takes it over."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def take(self) -> int:
        """The descriptor, whose owner is now the caller."""
        assert self._fd is not None, "a node without an arena was given one"
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _decode_places(blobs: Iterable[pb.BlobLocation]) -> list[BlobPlace]:
    return [BlobPlace(decode_expert(blob.expert), blob.offset, blob.generation) for blob in blobs]
