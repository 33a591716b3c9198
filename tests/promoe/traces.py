"""Traces for tests: any event (hypothesis), and runs made up from a seed, whose routing repeats itself as text does."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from promoe.hint import Float32Array, Hint, IdArray, StepSpan
from promoe.ids import ExpertId
from promoe.node_report import CacheShape, DeviceInfo, ModelInfo, Number, ServiceInfo
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent
from promoe.trace_header import TraceHeader
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2

HIDDEN = 4

_IDS = st.integers(0, 2**16 - 1)
_SECONDS = st.floats(0, 1e6)
_ID_TUPLES = st.lists(_IDS, max_size=6).map(tuple)
_TEXT = st.text(max_size=12)
_COUNTS = st.integers(0, 2**32 - 1)
_STEPS = st.integers(0, 2**63)


def _hidden(num_rows: int) -> st.SearchStrategy[Float32Array]:
    """Values that bfloat16 holds."""
    bits = hnp.arrays(np.uint32, (num_rows, HIDDEN), elements=st.integers(0, 0x7F7F).map(lambda high: high << 16))
    return bits.map(lambda values: values.view(np.float32))


@st.composite
def layer_events(draw: st.DrawFn) -> LayerEvent:
    topk_ids_TK = draw(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5)))
    rows = draw(st.lists(st.integers(0, topk_ids_TK.shape[0] - 1), unique=True).map(tuple))
    hidden = st.none() | _hidden(len(rows)) if rows else st.none()
    return LayerEvent(
        draw(_SECONDS), draw(_SECONDS), draw(_STEPS), draw(_IDS), topk_ids_TK, draw(_ID_TUPLES), draw(_ID_TUPLES),
        draw(_ID_TUPLES), draw(_SECONDS), rows, draw(hidden), draw(hidden), draw(hidden),
    )  # fmt: skip


@st.composite
def hint_events(draw: st.DrawFn) -> HintEvent:
    experts = np.array(draw(st.lists(_IDS, max_size=6)), np.uint16)
    scores = draw(hnp.arrays(np.float32, experts.shape, elements=st.floats(0, 1, width=32)))
    hint = Hint(draw(_STEPS), draw(_IDS), draw(_STEPS), draw(_IDS), experts, scores, draw(_COUNTS), draw(_TEXT))
    fate = draw(st.sampled_from(HintFate))
    return HintEvent(draw(_SECONDS), hint, fate, draw(st.none() | _SECONDS), draw(_COUNTS))


STEP_EVENTS = st.builds(
    StepEvent,
    at_s=_SECONDS,
    step=_STEPS,
    spans=st.lists(st.builds(StepSpan, _TEXT, _COUNTS, st.booleans()), max_size=3).map(tuple),
    ended_request_ids=st.lists(_TEXT, max_size=2).map(tuple),
    link_bytes_per_s=_SECONDS,
)
LOAD_EVENTS = st.builds(
    LoadEvent,
    at_s=_SECONDS,
    begin_s=_SECONDS,
    end_s=_SECONDS,
    expert=st.builds(ExpertId, _IDS, _IDS),
    reason=st.sampled_from(LoadReason),
    nbytes=_STEPS,
    look=_COUNTS,
    is_paused=st.booleans(),
)
TRACE_EVENTS: st.SearchStrategy[TraceEvent] = st.one_of(STEP_EVENTS, LOAD_EVENTS, layer_events(), hint_events())


def same_event(one: TraceEvent, other: TraceEvent) -> bool:
    """Equality of everything, arrays and their dtypes included."""
    return _comparable(one) == _comparable(other)


def _comparable(value: object) -> object:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, HintEvent | LayerEvent | Hint):
        return (type(value), {field.name: _comparable(getattr(value, field.name)) for field in fields(value)})
    return value


@dataclass(frozen=True)
class MadeUpRun:
    """A run of `num_requests` one after the other, each a prefill and some decode steps, over LRU slots.

    Attributes:
        repeat: how likely a token keeps one of the experts of the token before.
    """

    num_layers: int = 3
    num_experts: int = 8
    experts_per_token: int = 2
    slots_per_layer: int = 4
    num_requests: int = 2
    prompt_tokens: int = 5
    decode_steps: int = 6
    repeat: float = 0.5
    seed: int = 0

    def header(self) -> TraceHeader:
        """Of a cache that begins empty."""
        shape = decode_message(
            inference_pb2.CacheShape(
                slots_per_layer=self.slots_per_layer, slot_nbytes=4096, eviction="lru", chunk_nbytes=4000,
                cache_rate=self.slots_per_layer / self.num_experts, max_chunks_in_flight=1, policy="lru",
                slot_split="layer", hints="ignore", chunks_demand=True,
            ),
            CacheShape,
        )  # fmt: skip
        model = ModelInfo(
            "made up", "qwen2_moe", "00c0ffee", Number.BFLOAT16, self.num_layers, self.num_experts,
            self.experts_per_token, 4000, HIDDEN, 32, 128,
        )  # fmt: skip
        return TraceHeader(
            service=ServiceInfo("0.1.0", "1.0", "i1"),
            model=model,
            shape=shape,
            device=DeviceInfo("cpu", "Test CPU", "Because.", "emulated", 10**6),
            link_bytes_per_s=1e6,
            began_unix_s=1.7e9,
            resident=(-1,) * (self.num_layers * self.slots_per_layer),
            history_json="{}",
        )

    def events(self, *, hidden: bool = False) -> Iterator[TraceEvent]:
        """Step by step; of every layer a hint, the loads that it waited for one after the other, and the layer."""
        random = np.random.default_rng(self.seed)
        slots: list[list[int]] = [[] for _ in range(self.num_layers)]
        now_s, step = 0.0, 0
        ended: tuple[str, ...] = ()
        for request in range(self.num_requests):
            previous = random.integers(0, self.num_experts, (self.num_layers, self.experts_per_token))
            for number in range(1 + self.decode_steps):
                step += 1
                num_tokens = 1 if number else self.prompt_tokens
                yield StepEvent(now_s, step, (StepSpan(f"r{request}", num_tokens, number == 0),), ended)
                ended = ()
                for layer in range(self.num_layers):
                    ids_TK = np.stack([self._route(random, previous[layer]) for _ in range(num_tokens)])
                    yield _hint(step, layer, ids_TK[0], now_s)
                    loads = list(self._loads(layer, ids_TK, slots[layer], now_s))
                    yield from loads
                    event = self._layer(step, layer, ids_TK, loads, now_s)
                    hidden_RD = random.integers(-8, 8, (1, HIDDEN)).astype(np.float32)
                    yield replace(event, rows=(0,), layer_input_RD=hidden_RD) if hidden else event
                    previous[layer], now_s = ids_TK[-1], event.end_s
            ended = (f"r{request}",)

    def _route(self, random: np.random.Generator, previous_K: IdArray) -> IdArray:
        kept = [expert for expert in previous_K.tolist() if random.random() < self.repeat]
        others = [expert for expert in random.permutation(self.num_experts).tolist() if expert not in kept]
        return np.array(list(dict.fromkeys(kept + others))[: self.experts_per_token], np.uint16)

    def _loads(self, layer: int, ids_TK: IdArray, slots: list[int], now_s: float) -> Iterator[LoadEvent]:
        """One copy of a millisecond for each needed expert that is not in the layer's slots; LRU gives way."""
        for expert in np.unique(ids_TK).tolist():
            if expert in slots:
                slots.remove(expert)
            else:
                begin_s, now_s = now_s, now_s + 0.001
                yield LoadEvent(now_s, begin_s, now_s, ExpertId(layer, expert), LoadReason.DEMAND, 4000)
            slots.append(expert)
            del slots[: -self.slots_per_layer]

    def _layer(self, step: int, layer: int, ids_TK: IdArray, loads: list[LoadEvent], now_s: float) -> LayerEvent:
        misses = tuple(load.expert.expert for load in loads)
        hits = tuple(expert for expert in np.unique(ids_TK).tolist() if expert not in misses)
        stall_s = 0.001 * len(loads)
        return LayerEvent(now_s, now_s + stall_s + 0.002, step, layer, ids_TK, hits, misses, (), stall_s)


def _hint(step: int, layer: int, experts: IdArray, now_s: float) -> HintEvent:
    scores = np.linspace(1, 0.5, len(experts), dtype=np.float32)
    hint = Hint(step, layer, step, max(0, layer - 1), experts, scores, len(experts), "made-up@1")
    return HintEvent(now_s, hint, HintFate.TAKEN, 0.0005)
