"""What the CLI asks the expert store (best-effort: a store that does not answer is shown as such)."""

from dataclasses import dataclass
from enum import Enum

import grpc

from promoe.node_report import ModelInfo, ServiceInfo
from promoe.rpc import CHANNEL_OPTIONS
from promoe.transport import readable_error
from promoe.typed_message import decode_message
from promoe.v1 import expert_store_pb2, expert_store_pb2_grpc
from promoe.wire import check_schema


class FillState(Enum):
    """See expert_store.proto."""

    UNSPECIFIED = "unspecified"
    ADOPTING = "adopting"
    FILLING = "filling"
    FULL = "full"


@dataclass(frozen=True)
class ArenaInfo:
    """The shared arena."""

    uuid: str
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class StoreInfo:
    """Answer of GetInfo."""

    service: ServiceInfo
    model: ModelInfo
    arena: ArenaInfo
    fill_state: FillState
    filled_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Lease:
    """A compute node that is attached."""

    node_instance_id: str
    pid: int
    held_s: float


@dataclass(frozen=True)
class StoreStats:
    """Answer of Stats."""

    published_blobs: int
    retired_blobs: int
    arena_bytes: int
    fill_s: float
    fill_bytes_per_s: float
    verified_blobs: int
    damaged_blobs: int
    leases: tuple[Lease, ...]
    adopted: bool


def store_info(endpoint: str, timeout_s: float) -> StoreInfo:
    """Asks the store who it is and how far its fill has come.

    Raises:
        PromoeError: as the store or the connection fails; ModelMismatch for another schema.
    """
    with grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            response = expert_store_pb2_grpc.ExpertStoreStub(channel).GetInfo(
                expert_store_pb2.ExpertStoreGetInfoRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise readable_error(error, endpoint) from error
    check_schema(response.service, f"The expert store at {endpoint}")
    return decode_message(response, StoreInfo)


def store_stats(endpoint: str, timeout_s: float) -> StoreStats:
    """Asks the store for its counters and leases; raises as `store_info`."""
    with grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS) as channel:
        try:
            response = expert_store_pb2_grpc.ExpertStoreStub(channel).Stats(
                expert_store_pb2.ExpertStoreStatsRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise readable_error(error, endpoint) from error
    return decode_message(response, StoreStats)
