"""A second implementation of the Inference service: it answers what a script says, over real sockets."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import Self

from google.protobuf.message import Message

from promoe.rpc import RpcServer
from promoe.v1 import inference_pb2, inference_pb2_grpc, model_pb2
from promoe.wire import SCHEMA_VERSION

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Act(Enum):
    """What a script can do besides sending a message or raising an error."""

    HANG = "wait until the client is gone"
    END = "end the stream here"


Step = inference_pb2.GenerateResponse | inference_pb2.TraceResponse | Exception | Act


def accepted(request_id: str = "r1", prompt_tokens: int = 3, seed: int = 7) -> inference_pb2.GenerateResponse:
    """The first message of a stream."""
    return inference_pb2.GenerateResponse(
        accepted=inference_pb2.Accepted(request_id=request_id, prompt_tokens=prompt_tokens, seed=seed)
    )


def delta(text: str, *token_ids: int) -> inference_pb2.GenerateResponse:
    """A piece of the answer."""
    return inference_pb2.GenerateResponse(delta=inference_pb2.TextDelta(text=text, token_ids=token_ids))


def finish(output_tokens: int = 2) -> inference_pb2.GenerateResponse:
    """The last message of a stream."""
    use = inference_pb2.ExpertUse(hits=30, misses=10, loaded_bytes=1 << 20, stall_s=0.25)
    usage = inference_pb2.Usage(
        prompt_tokens=3, output_tokens=output_tokens, ttft_s=0.5, tpot_s=0.1, queue_s=0.01, prefill=use, decode=use
    )
    reason = inference_pb2.FINISH_REASON_STOP_STRING
    return inference_pb2.GenerateResponse(
        finish=inference_pb2.Finish(reason=reason, stop_string="\n", stop_token_id=None, usage=usage)
    )


HELLO: tuple[Step, ...] = (accepted(), delta("Hel", 11), delta("lo", 12), finish())


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Plays one script per Generate call (the last one again and again) and remembers what it was asked.

    Attributes:
        scripts: what the next calls do.
        stats: the answer of CacheStats.
        cache_map: the answer of CacheMap.
        unary_errors: raised by the next unary calls (GetInfo excepted), one each.
        info_errors: raised by the next GetInfo calls, one each.
        trace_script: what every Trace call does.
        predictor: what GetInfo says of the node's predictor.
        requests, trace_requests: Generate and Trace requests so far.
        num_info_calls: GetInfo calls so far.
        hung_up: set when a client left a hanging call.
        hanging: set when a script has come to its HANG.
    """

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self.scripts = list(scripts)
        self.stats = _stats()
        self.cache_map = _cache_map()
        self.unary_errors: list[Exception] = []
        self.info_errors: list[Exception] = []
        self.trace_script: Sequence[Step] = (Act.HANG,)
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.trace_requests: list[inference_pb2.TraceRequest] = []
        self.num_info_calls = 0
        self.schema_version = SCHEMA_VERSION
        self.instance_id = "i1"
        self.device_kind = "cpu"
        self.predictor = inference_pb2.PredictorLink()
        self.hung_up = threading.Event()
        self.hanging = threading.Event()

    async def GetInfo(
        self, _request: inference_pb2.InferenceGetInfoRequest, _context: object
    ) -> inference_pb2.InferenceGetInfoResponse:
        self.num_info_calls += 1
        if self.info_errors:
            raise self.info_errors.pop(0)
        return inference_pb2.InferenceGetInfoResponse(
            service=model_pb2.ServiceInfo(
                version="0.1.0", schema_version=self.schema_version, instance_id=self.instance_id
            ),
            model=model_pb2.ModelSpec(
                name="tiny", family="mixtral", fingerprint="ab12", dtype=model_pb2.DTYPE_BFLOAT16, num_moe_layers=4,
                num_experts=8, experts_per_token=2, expert_nbytes=1 << 20, hidden_size=64, vocab_size=100,
                max_context_tokens=512,
            ),
            engine=inference_pb2.ENGINE_KIND_CONTINUOUS,
            engine_reason="Continuous batching holds its KV.",
            device=inference_pb2.DeviceInfo(
                kind=self.device_kind, name="Test CPU", reason="No CUDA device.", link="emulated",
                emulated_link_bytes_per_s=10**9,
            ),
            limits=inference_pb2.Limits(max_context_tokens=512, max_new_tokens=256, max_prompt_bytes=4096),
            expert_cache=_shape(),
            store=inference_pb2.StoreLink(
                endpoint="unix:/x", state=inference_pb2.STORE_STATE_FROZEN, arena_uuid="u", arena_kind="memfd"
            ),
            predictor=self.predictor,
        )  # fmt: skip

    async def Generate(
        self, request: inference_pb2.GenerateRequest, _context: object
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async for message in self._play(script):
            assert isinstance(message, inference_pb2.GenerateResponse)
            yield message

    async def Trace(
        self, request: inference_pb2.TraceRequest, _context: object
    ) -> AsyncIterator[inference_pb2.TraceResponse]:
        self.trace_requests.append(request)
        async for message in self._play(self.trace_script):
            assert isinstance(message, inference_pb2.TraceResponse)
            yield message

    async def _play(self, script: Sequence[Step]) -> AsyncIterator[Message]:
        for step in script:
            if step is Act.END:
                return
            if step is Act.HANG:
                self.hanging.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.hung_up.set()
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, Message):
                yield step

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, _context: object
    ) -> inference_pb2.TokenizeResponse:
        """A token per character; chat messages one behind the other."""
        self._maybe_fail()
        text = request.text or "".join(f"{m.role}:{m.content}" for m in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=[ord(character) for character in text])

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, _context: object
    ) -> inference_pb2.DetokenizeResponse:
        """The inverse of Tokenize for text."""
        self._maybe_fail()
        return inference_pb2.DetokenizeResponse(text="".join(chr(number) for number in request.token_ids))

    async def CacheStats(
        self, _request: inference_pb2.CacheStatsRequest, _context: object
    ) -> inference_pb2.CacheStatsResponse:
        self._maybe_fail()
        return self.stats

    async def CacheMap(
        self, _request: inference_pb2.CacheMapRequest, _context: object
    ) -> inference_pb2.CacheMapResponse:
        self._maybe_fail()
        return self.cache_map

    def _maybe_fail(self) -> None:
        if self.unary_errors:
            raise self.unary_errors.pop(0)


def _shape() -> inference_pb2.CacheShape:
    return inference_pb2.CacheShape(
        slots_per_layer=4, slot_nbytes=1 << 20, cache_rate=0.5, eviction="lru", chunk_nbytes=1 << 20,
        max_chunks_in_flight=2,
    )  # fmt: skip


def _stats() -> inference_pb2.CacheStatsResponse:
    return inference_pb2.CacheStatsResponse(
        prefill=inference_pb2.PhaseStats(hits=1, misses=3, steps=1, tokens=9, stall_s=0.5, demand_bytes=3 << 20),
        decode=inference_pb2.PhaseStats(hits=30, misses=10, steps=20, tokens=20),
        layers=[inference_pb2.LayerStats(layer=0, resident=4, hits=31, misses=13, evictions=9)],
        uploaded_bytes=13 << 20,
        link_busy_s=1.5,
        shape=_shape(),
        running_requests=1,
        queued_requests=2,
    )


def _cache_map() -> inference_pb2.CacheMapResponse:
    """Each expert's byte is its place."""
    return inference_pb2.CacheMapResponse(num_moe_layers=4, num_experts=8, experts=bytes(range(32)), step=21, layer=2)


class ScriptedNode:
    """Serves a ScriptedInference in the running event loop, as a compute node would."""

    def __init__(self, servicer: ScriptedInference, endpoint: str = "127.0.0.1:0") -> None:
        self._rpc = RpcServer((INFERENCE,))
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, self._rpc.server)
        self.endpoint = self._rpc.listen(endpoint)

    async def set_serving(self, serving: bool) -> None:
        """Health of the node."""
        await self._rpc.set_serving(serving)

    async def __aenter__(self) -> Self:
        await self._rpc.start()
        await self._rpc.set_serving(True)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._rpc.stop(0)


@contextmanager
def serve_in_thread(
    servicer: ScriptedInference, endpoint: str = "127.0.0.1:0", *, serving: bool = True
) -> Iterator[str]:
    """Serves in an event loop of its own, for blocking clients; gives the endpoint."""
    ready: Future[str] = Future()
    loop = asyncio.new_event_loop()
    end = asyncio.Event()

    async def serve() -> None:
        try:
            async with ScriptedNode(servicer, endpoint) as node:
                await node.set_serving(serving)
                ready.set_result(node.endpoint)
                await end.wait()
        except RuntimeError as error:
            ready.set_exception(error)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield ready.result(timeout=20)
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(timeout=20)
        loop.close()
