"""An expert store, a compute node and a predictor without a model, as modules that a supervisor can start.

    python -m tests.promoe.scripted_services store ENDPOINT
    python -m tests.promoe.scripted_services node ENDPOINT [stubborn] [predicted]
    python -m tests.promoe.scripted_services predictor ENDPOINT

Each appends its name to `stopped.txt` beside its log when it stops by itself.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from promoe.rpc import RpcServer
from promoe.v1 import expert_store_pb2, expert_store_pb2_grpc, inference_pb2, model_pb2, predictor_pb2
from promoe.wire import SCHEMA_VERSION
from tests.promoe.scripted_inference import HELLO, ScriptedInference, ScriptedNode

STORE = expert_store_pb2.DESCRIPTOR.services_by_name["ExpertStore"].full_name


class ScriptedStore(expert_store_pb2_grpc.ExpertStoreServicer):
    """Half full when first asked, full ever after."""

    def __init__(self) -> None:
        self._num_asked = 0

    async def GetInfo(
        self, _request: expert_store_pb2.ExpertStoreGetInfoRequest, _context: object
    ) -> expert_store_pb2.ExpertStoreGetInfoResponse:
        self._num_asked += 1
        is_full = self._num_asked > 1
        return expert_store_pb2.ExpertStoreGetInfoResponse(
            service=model_pb2.ServiceInfo(version="0.1.0", schema_version=SCHEMA_VERSION, instance_id="s1"),
            arena=expert_store_pb2.ArenaInfo(uuid="ab", kind="memfd", size_bytes=64 << 20),
            fill_state=expert_store_pb2.FILL_STATE_FULL if is_full else expert_store_pb2.FILL_STATE_FILLING,
            filled_bytes=(64 if is_full else 32) << 20,
            total_bytes=64 << 20,
        )

    async def Attach(
        self, _requests: AsyncIterator[expert_store_pb2.AttachRequest], _context: object
    ) -> AsyncIterator[expert_store_pb2.AttachResponse]:
        yield expert_store_pb2.AttachResponse(table=expert_store_pb2.BlobTable(complete=True))

    async def Stats(
        self, _request: expert_store_pb2.ExpertStoreStatsRequest, _context: object
    ) -> expert_store_pb2.ExpertStoreStatsResponse:
        return expert_store_pb2.ExpertStoreStatsResponse(
            published_blobs=32,
            fill_s=2.0,
            fill_bytes_per_s=float(32 << 20),
            damaged_blobs=1,
            leases=[expert_store_pb2.Lease(node_instance_id="i1", pid=77, held_s=12.0)],
        )


async def _serve_store(endpoint: str, stopped: asyncio.Event) -> None:
    rpc = RpcServer((STORE,))
    expert_store_pb2_grpc.add_ExpertStoreServicer_to_server(ScriptedStore(), rpc.server)
    rpc.listen(endpoint)
    await rpc.start()
    await rpc.set_serving(True)
    await stopped.wait()
    await rpc.stop(0)


async def _serve_node(endpoint: str, stopped: asyncio.Event, is_predicted: bool) -> None:
    inference = ScriptedInference(HELLO)
    if is_predicted:
        inference.predictor = inference_pb2.PredictorLink(
            endpoint="unix:/p",
            state=inference_pb2.PREDICTOR_STATE_CONNECTED,
            active=predictor_pb2.PredictorVersion(version="frequency@1", predictor="frequency", lookaheads=[4]),
        )
    async with ScriptedNode(inference, endpoint):
        await stopped.wait()


async def _serve(kind: str, endpoint: str, *manners: str) -> None:
    stopped = asyncio.Event()
    if "stubborn" in manners:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    sys.stdout.write(f"{kind} {os.getpid()} serves\n")
    sys.stdout.flush()
    if kind == "store":
        await _serve_store(endpoint, stopped)
    elif kind == "node":
        await _serve_node(endpoint, stopped, "predicted" in manners)
    else:
        await stopped.wait()
    with (Path(endpoint.removeprefix("unix:")).parent / "stopped.txt").open("a") as file:
        file.write(f"{kind}\n")


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
