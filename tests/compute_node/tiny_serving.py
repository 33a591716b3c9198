"""A tiny model behind an engine, for tests of engines and of the service: what `__main__` wires, minus experts."""

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compute_node.admission import Admission, AdmissionLimits
from compute_node.answer import Answerer
from compute_node.answer_grammar import GrammarCompiler
from compute_node.answer_record import AnswerRecord
from compute_node.batch_loop import BatchLimits
from compute_node.call_naming import name_call
from compute_node.continuous_engine import ContinuousEngine
from compute_node.engine import (
    Engine,
    EngineEvent,
    EngineKind,
    EngineRequest,
    RequestEnded,
    RequestFailed,
    TokenDrawn,
)
from compute_node.expert_cache import CacheSnapshot
from compute_node.http.answer_wire import ServedModel
from compute_node.http.node_parts import NodeParts, NodeWatch
from compute_node.interleaved_engine import InterleavedEngine
from compute_node.node_report import NodeIdentity, NodeReport
from compute_node.prompt import PromptCodec, PromptLimits
from compute_node.request_metrics import RequestMetrics
from compute_node.sampling import SampledToken, Sampling
from compute_node.service import SERVICE_NAME, InferenceService
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from compute_node.trace_recorder import TraceRecorder
from promoe.cache_map import CacheMap
from promoe.errors import PromoeError
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from promoe.node_report import (
    ActivePredictor,
    CacheShape,
    CacheStats,
    DeviceInfo,
    HintQuality,
    HintStats,
    Histogram,
    LayerStats,
    ObservedKind,
    PhaseStats,
    PredictorLink,
    PredictorState,
    PrefetchStats,
    StepPhase,
    StoreLink,
    StoreState,
)
from promoe.rpc import RpcServer
from promoe.v1 import inference_pb2_grpc
from tests.families import END_OF_TURN_ID, VOCABULARY, write_tokenizer

EVENT_DEADLINE_S = 60.0
"""No event of a tiny model takes this long: a test that waits longer has found a hang."""

LIMITS = BatchLimits(num_kv_blocks=64, max_batch_tokens=32, max_concurrent_requests=8)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer with a chat template, written to `folder` and loaded from it."""
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "a tokenizer was written"
    return tokenizer


def greedy_oracle(
    model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int, repetition_penalty: float = 1.0
) -> list[int]:
    """Transformers' own `generate`."""
    ids = torch.tensor([list(prompt_ids)])
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=10**6,
        pad_token_id=0,
    )
    # PreTrainedModel is the only type that all causal LMs share; it declares `generate` through __getattr__.
    sequences = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]
    return [int(token_id) for token_id in sequences[0, len(prompt_ids) :]]


def engine_request(request_id: str, prompt_ids: Sequence[int], max_tokens: int, **options: object) -> EngineRequest:
    """A request that only its length ends; `options` are those of Sampling."""
    return EngineRequest(request_id, tuple(prompt_ids), max_tokens, Sampling(**options), frozenset())  # type: ignore[arg-type]


@dataclass
class EventLog:
    """Collects one request's events; `sink` is called on the engine's thread, the rest by the test."""

    _events: "queue.SimpleQueue[EngineEvent]" = field(default_factory=queue.SimpleQueue)

    def sink(self, event: EngineEvent) -> None:
        """One event."""
        self._events.put(event)

    def next(self) -> EngineEvent:
        """The next event."""
        return self._events.get(timeout=EVENT_DEADLINE_S)

    def until_token(self) -> SampledToken:
        """The next token."""
        while True:
            event = self.next()
            if isinstance(event, TokenDrawn):
                return event.token

    def tokens_and_end(self) -> tuple[list[SampledToken], RequestEnded]:
        """All tokens that are still to come; raises the error if the request fails."""
        tokens = []
        while True:
            event = self.next()
            if isinstance(event, TokenDrawn):
                tokens.append(event.token)
            elif isinstance(event, RequestEnded):
                return tokens, event
            elif isinstance(event, RequestFailed):
                raise event.error

    def token_ids(self) -> list[int]:
        """All tokens that are still to come."""
        return [token.token_id for token in self.tokens_and_end()[0]]

    def failure(self) -> PromoeError:
        """The error that ends the request."""
        while True:
            event = self.next()
            assert not isinstance(event, RequestEnded), "the request ended well"
            if isinstance(event, RequestFailed):
                return event.error


def submit(engine: Engine, request: EngineRequest) -> EventLog:
    """Submits and returns the log of its events."""
    log = EventLog()
    engine.submit(request, log.sink)
    return log


@dataclass
class StepLog:
    """What an engine told its step observer, and whether it died."""

    phases: list[Phase] = field(default_factory=list)
    has_died: bool = False

    def observe(self, phase: Phase, elapsed_s: float) -> None:
        """A step."""
        assert elapsed_s > 0, "a step takes time"
        self.phases.append(phase)

    def died(self) -> None:
        """The engine's thread ended without having been stopped."""
        self.has_died = True


class SpanRecorder(StepLedger):
    """A ledger that keeps the spans of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[TokenSpan, ...]] = []

    def end_step(self) -> None:
        """Keeps the step's spans."""
        self.steps.append(self.spans)
        super().end_step()

    def spans_of(self, request_id: str) -> list[TokenSpan]:
        """One request's spans, in order."""
        return [span for step in self.steps for span in step if span.request_id == request_id]

    def prefill_of(self, request_id: str) -> int:
        """Prompt tokens that were computed for one request."""
        return sum(span.num_tokens for span in self.spans_of(request_id) if span.phase is Phase.PREFILL)


@contextmanager
def continuous_engine(
    model: PreTrainedModel, limits: BatchLimits = LIMITS, ledger: StepLedger | None = None, steps: StepLog | None = None
) -> Iterator[ContinuousEngine]:
    """A started continuous engine, stopped at the end."""
    steps = steps or StepLog()
    engine = ContinuousEngine(model, ledger or StepLedger(), limits, steps.observe, steps.died)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def interleaved_engine(
    model: PreTrainedModel, ledger: StepLedger | None = None, steps: StepLog | None = None
) -> Iterator[InterleavedEngine]:
    """A started interleaved engine, stopped at the end."""
    steps = steps or StepLog()
    engine = InterleavedEngine(model, ledger or StepLedger(), 512, steps.observe, steps.died)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def started_engine(
    kind: EngineKind, model: PreTrainedModel, ledger: StepLedger | None = None, steps: StepLog | None = None
) -> Iterator[Engine]:
    """A started engine of either kind, stopped at the end."""
    if kind is EngineKind.CONTINUOUS:
        with continuous_engine(model, LIMITS, ledger, steps) as engine:
            yield engine
    else:
        with interleaved_engine(model, ledger, steps) as engine:
            yield engine


class FixedReport:
    """A cache report with numbers that a test can find again on the wire."""

    shape = CacheShape(
        slots_per_layer=3,
        slot_nbytes=4096,
        cache_rate=0.375,
        eviction="next_use",
        chunk_nbytes=1024,
        max_chunks_in_flight=2,
        policy="proactive",
        slot_split="global",
        hints="budgeted",
        early_preemption=True,
        reorder=True,
        stream_prefill=False,
        chunks_demand=True,
        serial=False,
    )
    store = StoreLink(endpoint="unix:/run/store", state=StoreState.ATTACHED, arena_uuid="a1", arena_kind="memfd")
    predictor = PredictorLink(
        endpoint="unix:/run/predictor",
        state=PredictorState.CONNECTED,
        active=ActivePredictor("learned@7", "learned", ObservedKind.LAYER_INPUT, (1, 2), True, True),
    )
    stats = CacheStats(
        prefill=PhaseStats(1, 2, 3, 4, 0.5, 5, 0, 0.0),
        decode=PhaseStats(7, 8, 9, 10, 1.5, 11, 3, 0.75),
        layers=(LayerStats(0, 3, 0, 8, 10, 5, True), LayerStats(1, 2, 1, 0, 0, 0, False)),
        uploaded_bytes=18,
        link_busy_s=0.25,
        shape=shape,
        running_requests=0,
        queued_requests=0,
        prefetch=PrefetchStats(21, 22, 23, 24, 25.5),
        hints=HintStats(
            taken=31,
            late=32,
            invalid=33,
            wrong_version=34,
            overflow=35,
            observations_sent=36,
            observations_dropped=37,
            qualities=(HintQuality("learned@7", 1, 2, StepPhase.DECODE, 5, 10, 8, 6, 11, (4, 8, 9)),),
            latency=Histogram((0.001, 0.01), (3, 2, 1)),
            time_until_use=Histogram((0.001, 0.01), (1, 2, 3)),
        ),
    )
    map = CacheMap(num_moe_layers=3, num_experts=8, experts=bytes(range(24)), step=5, layer=2)

    def cache_shape(self) -> CacheShape:
        """Fixed."""
        return self.shape

    def store_link(self) -> StoreLink:
        """Fixed."""
        return self.store

    def predictor_link(self) -> PredictorLink:
        """Fixed."""
        return self.predictor

    def cache_stats(self, running_requests: int, queued_requests: int) -> CacheStats:
        """Fixed, but for the load."""
        return replace(self.stats, running_requests=running_requests, queued_requests=queued_requests)

    def cache_map(self) -> CacheMap:
        """Fixed."""
        return self.map


SPEC = ModelSpec(
    name="tiny",
    family="qwen2_moe",
    fingerprint="f" * 16,
    num_moe_layers=3,
    num_experts=8,
    experts_per_token=2,
    hidden_size=32,
    vocab_size=len(VOCABULARY),
    max_context_tokens=256,
    layout=ExpertLayout.of(Dtype.FLOAT32, {"gate_up_proj": (48, 32), "down_proj": (32, 24)}),
)


@dataclass
class Serving:
    """A running Inference server, what stands behind it, and what was told of answers that are over."""

    stub: "inference_pb2_grpc.InferenceAsyncStub"
    endpoint: str
    admission: Admission
    registry: CollectorRegistry
    traces: TraceRecorder
    parts: NodeParts
    answers: list[AnswerRecord]


@asynccontextmanager
async def serving(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    limits: AdmissionLimits | None = None,
    prompt_limits: PromptLimits | None = None,
) -> AsyncIterator[Serving]:
    """The whole service over `engine` on a real socket."""
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    codec = PromptCodec(tokenizer, prompt_limits or PromptLimits(len(VOCABULARY), 256, 4096))
    admission = Admission(engine, limits or AdmissionLimits(8, 8, 60.0), metrics)
    eos_token_ids = frozenset({END_OF_TURN_ID})
    grammars = GrammarCompiler(tokenizer, len(VOCABULARY), eos_token_ids)
    answers: list[AnswerRecord] = []
    answerer = Answerer(admission, codec, eos_token_ids, metrics, grammars, answers.append)
    device = DeviceInfo(
        kind="cpu", name="a CPU", reason="It was asked for.", link="memcpy", emulated_link_bytes_per_s=None
    )
    identity = NodeIdentity("instance-1", SPEC, engine.kind, "It was asked for.", device)
    traces = TraceRecorder(SPEC.num_moe_layers, lambda: CacheSnapshot([5, -1], '{"uses": 2}'))
    server = RpcServer((SERVICE_NAME,), name_call)
    inference_pb2_grpc.add_InferenceServicer_to_server(
        InferenceService(answerer, codec, admission, identity, FixedReport(), traces), server.server
    )
    endpoint = server.listen("127.0.0.1:0")
    await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(endpoint) as channel:
        watch = NodeWatch(NodeReport(identity, FixedReport()), metrics.token_times)
        model = ServedModel.of(SPEC, codec.limits.max_context_tokens)
        parts = NodeParts(model, answerer, codec, admission, registry, watch)
        yield Serving(inference_pb2_grpc.InferenceStub(channel), endpoint, admission, registry, traces, parts, answers)
    await admission.drain(EVENT_DEADLINE_S)
    await server.stop(grace_s=0)
    await asyncio.sleep(0)
