"""The gRPC face of the expert store: decode, call the store, encode."""

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeAlias
from uuid import uuid4

import grpc.aio

from expert_store.arena import Arena
from expert_store.blob_table import BlobsAdded, BlobTable, BlobWithdrawn, Lease, PublishedBlob, StoreEvent, TableSent
from expert_store.store import ExpertStore, Phase
from promoe.errors import InvalidInput, ModelMismatch, PromoeError
from promoe.v1 import expert_store_pb2 as pb
from promoe.v1 import expert_store_pb2_grpc as pb_grpc
from promoe.v1 import model_pb2
from promoe.wire import SCHEMA_VERSION, check_schema, decode_expert, encode_expert, encode_spec

if TYPE_CHECKING:
    # gRPC's classes are generic for the type checker only.
    _Context: TypeAlias = grpc.aio.ServicerContext[object, object]

SERVICE_NAME: Final = "promoe.v1.ExpertStore"

_FILL_STATES: Final = {
    Phase.ADOPTING: pb.FILL_STATE_ADOPTING,
    Phase.FILLING: pb.FILL_STATE_FILLING,
    Phase.FULL: pb.FILL_STATE_FULL,
}


class ExpertStoreService(pb_grpc.ExpertStoreServicer):
    """Servicer of one store.

    Args:
        fd_socket: path that GetInfo tells the nodes.
    """

    def __init__(self, store: ExpertStore, fd_socket: str) -> None:
        self._store = store
        self._fd_socket = fd_socket
        self._info = model_pb2.ServiceInfo(
            version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=uuid4().hex
        )
        self._streams: set[asyncio.Queue[StoreEvent | PromoeError | None]] = set()

    def register(self, server: grpc.aio.Server) -> None:
        """Makes the server answer for this service."""
        pb_grpc.add_ExpertStoreServicer_to_server(self, server)

    def end_streams(self, error: PromoeError) -> None:
        """Ends every attached node's stream with what ends the store."""
        for events in self._streams:
            events.put_nowait(error)

    async def GetInfo(
        self, request: pb.ExpertStoreGetInfoRequest, context: "_Context"
    ) -> pb.ExpertStoreGetInfoResponse:
        """Answers from memory, in every phase."""
        stats = self._store.stats()
        arena = self._store.arena
        return pb.ExpertStoreGetInfoResponse(
            service=self._info,
            model=encode_spec(self._store.spec),
            arena=_encode_arena(arena) if arena else None,
            fill_state=_FILL_STATES[self._store.phase],
            filled_bytes=stats.filled_nbytes,
            total_bytes=stats.total_nbytes,
            fd_socket=self._fd_socket,
        )

    async def Stats(self, request: pb.ExpertStoreStatsRequest, context: "_Context") -> pb.ExpertStoreStatsResponse:
        """Answers from memory."""
        stats = self._store.stats()
        return pb.ExpertStoreStatsResponse(
            published_blobs=stats.published_blobs,
            retired_blobs=stats.retired_blobs,
            arena_bytes=stats.arena_nbytes,
            fill_s=stats.fill_s,
            fill_bytes_per_s=stats.fill_bytes_per_s,
            verified_blobs=stats.verified_blobs,
            damaged_blobs=stats.damaged_blobs,
            leases=[
                pb.Lease(node_instance_id=lease.node_instance_id, pid=lease.pid, held_s=lease.held_s)
                for lease in stats.leases
            ],
            adopted=stats.adopted,
        )

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: "_Context"
    ) -> AsyncIterator[pb.AttachResponse]:
        """One node's lease: from its hello until either side ends the stream."""
        hello = await self._read_hello(request_iterator)
        arena, table = await self._store.wait_for_table()
        events: asyncio.Queue[StoreEvent | PromoeError | None] = asyncio.Queue()
        instance_id = hello.service.instance_id
        lease = Lease(instance_id, hello.pid, self._store.kernel_pid_of(instance_id), events.put_nowait)
        self._store.attach(table, lease, knows_arena=hello.arena_uuid == arena.uuid)
        acknowledgements = asyncio.create_task(_read_acknowledgements(request_iterator, table, lease, events))
        self._streams.add(events)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, PromoeError):
                    raise event
                yield _encode_event(event, arena)
        finally:
            self._streams.discard(events)
            acknowledgements.cancel()
            self._store.detach(table, lease)

    async def _read_hello(self, requests: AsyncIterator[pb.AttachRequest]) -> pb.AttachHello:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("event") != "hello":
            raise InvalidInput("The first message of Attach must be a hello.")
        hello = first.hello
        check_schema(hello.service, "the compute node")
        if not hello.service.instance_id:
            raise InvalidInput("The hello lacks service.instance_id.")
        if hello.fingerprint and hello.fingerprint != self._store.spec.fingerprint:
            raise ModelMismatch(
                f"The compute node was started for the model with fingerprint {hello.fingerprint}; this store has "
                f"{self._store.spec.name} with fingerprint {self._store.spec.fingerprint}."
            )
        return hello


async def _read_acknowledgements(
    requests: AsyncIterator[pb.AttachRequest],
    table: BlobTable,
    lease: Lease,
    events: "asyncio.Queue[StoreEvent | PromoeError | None]",
) -> None:
    """Feeds the node's acknowledgements to the table; puts None (or what was wrong) when the node has ended."""
    try:
        async for request in requests:
            if request.WhichOneof("event") != "retire_ack":
                raise InvalidInput("After the hello, a node sends acknowledgements only.")
            table.acknowledge(lease, decode_expert(request.retire_ack.expert), request.retire_ack.generation)
    except PromoeError as error:
        events.put_nowait(error)
    else:
        events.put_nowait(None)


def _encode_arena(arena: Arena) -> pb.ArenaInfo:
    return pb.ArenaInfo(
        uuid=arena.uuid,
        kind=arena.kind,
        size_bytes=arena.layout.nbytes,
        data_offset=arena.layout.data_offset,
        blob_stride_bytes=arena.layout.blob_stride_nbytes,
    )


def _encode_event(event: StoreEvent, arena: Arena) -> pb.AttachResponse:
    nbytes = arena.layout.blob_nbytes
    match event:
        case TableSent():
            blobs = [_encode_blob(blob, nbytes) for blob in event.blobs]
            return pb.AttachResponse(
                table=pb.BlobTable(arena=_encode_arena(arena), blobs=blobs, complete=event.complete)
            )
        case BlobsAdded():
            blobs = [_encode_blob(blob, nbytes) for blob in event.blobs]
            return pb.AttachResponse(published=pb.BlobsPublished(blobs=blobs, complete=event.complete))
        case BlobWithdrawn():
            return pb.AttachResponse(
                retired=pb.BlobRetired(
                    expert=encode_expert(event.expert), generation=event.generation, reason=event.reason
                )
            )


def _encode_blob(blob: PublishedBlob, nbytes: int) -> pb.BlobLocation:
    return pb.BlobLocation(
        expert=encode_expert(blob.expert), offset=blob.offset, nbytes=nbytes, generation=blob.generation
    )
