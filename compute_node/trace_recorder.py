"""Records what the expert cache is told, step by step, for one reader at a time.

The engine thread collects a step's events and puts the whole step into a bounded queue; the event loop takes it out,
and a worker thread waits for its hidden states. While nobody records, an event costs a look at one attribute.

    sink, sampler (engine thread) ──► step ──► queue ──► batches (event loop) ──► reader
                                        └──► left out and counted, when the queue is full
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import torch

from compute_node.expert_cache import CacheSnapshot
from compute_node.layer_sample import LayerSample, WantedSamples
from promoe.errors import Overloaded, Unavailable
from promoe.hint import Float32Array, ObservedKind, StepStart
from promoe.trace_events import LayerEvent, StepEvent, TraceBatch, TraceEvent

MAX_ROWS: Final = 1024
"""Sampled tokens of a step that a trace may ask for."""

QUEUE_NBYTES: Final = 64 << 20
"""Steps that wait for a slow reader; the next one is left out when there are so many."""

BATCH_NBYTES: Final = 1 << 20
"""A batch is closed when it has so much; a step of many tokens becomes several."""

_PAUSE_S: Final = 0.5
"""Steps that come within it travel together."""

_EVENT_NBYTES: Final = 256
_RETRY_AFTER_MS: Final = 5000

_Converted = TypeVar("_Converted")


@dataclass(frozen=True)
class TraceWish:
    """What a reader wants besides the events.

    Attributes:
        max_rows: hidden states of at most so many tokens of each step; 0 for none.
        layer_input, router_input: which.

    Raises:
        ValueError: rows without a kind, a kind without rows, or too many rows.
    """

    max_rows: int
    layer_input: bool
    router_input: bool

    def __post_init__(self) -> None:
        if not 0 <= self.max_rows <= MAX_ROWS:
            raise ValueError(f"max_rows is {self.max_rows}; allowed: 0 to {MAX_ROWS}")
        if bool(self.max_rows) != (self.layer_input or self.router_input):
            raise ValueError(
                f"max_rows is {self.max_rows} with layer_input {self.layer_input} and router_input "
                f"{self.router_input}; allowed: rows of at least one kind, or 0 of none"
            )


@dataclass(frozen=True)
class TraceBeginning:
    """The moment before the first recorded step; `began_s` is on the events' clock."""

    snapshot: CacheSnapshot
    began_s: float
    began_unix_s: float


@dataclass(eq=False)
class _RecordedStep:
    """One step's events as the cache told them; hidden states may still be on their way to the host."""

    events: list[TraceEvent] = field(default_factory=list)
    samples: dict[tuple[int, ObservedKind], LayerSample] = field(default_factory=dict)
    nbytes: int = 0

    def weigh(self) -> None:
        """Sets `nbytes`, about; all samples of a step are alike."""
        hidden = next((sample.hidden for sample in self.samples.values()), None)
        self.nbytes = len(self.events) * _EVENT_NBYTES
        self.nbytes += sum(event.topk_ids_TK.nbytes for event in self.events if isinstance(event, LayerEvent))
        self.nbytes += 0 if hidden is None else hidden.tensor.nbytes * len(self.samples)

    def finished_events(self, num_layers: int) -> Iterator[TraceEvent]:
        """The events with their hidden states; blocks until those have come."""
        layer_inputs = self._hidden_by_layer(ObservedKind.LAYER_INPUT)
        router_inputs = self._hidden_by_layer(ObservedKind.ROUTER_INPUT)
        rows = next((sample.rows for sample in self.samples.values()), ())  # the same in every layer
        for event in self.events:
            if rows and isinstance(event, LayerEvent):
                is_last = event.layer == num_layers - 1
                yield replace(
                    event,
                    rows=rows,
                    layer_input_RD=layer_inputs.get(event.layer),
                    router_input_RD=router_inputs.get(event.layer),
                    last_output_RD=layer_inputs.get(num_layers) if is_last else None,
                )
            else:
                yield event

    def _hidden_by_layer(self, kind: ObservedKind) -> dict[int, Float32Array]:
        """One conversion for all layers."""
        copies = {
            layer: sample.hidden
            for (layer, of_kind), sample in self.samples.items()
            if of_kind is kind and sample.hidden is not None
        }
        if not copies:
            return {}
        hidden_LRD: Float32Array = torch.stack([copy.wait() for copy in copies.values()]).to(torch.float32).numpy()
        return dict(zip(copies, hidden_LRD, strict=True))


class Recording:
    """One trace while it is recorded; made by `TraceRecorder.open`, inside the event loop that reads it.

    Args:
        wish: what it wants besides events.
        num_layers: MoE layers: with the last one a step is over.
        snapshot: of the expert cache; called on the engine thread.
    """

    def __init__(self, wish: TraceWish, num_layers: int, snapshot: Callable[[], CacheSnapshot]) -> None:
        self._wish = wish
        self._num_layers = num_layers
        self._snapshot = snapshot
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._is_closed = False
        # Of both threads.
        self._lock = threading.Lock()
        self._queue: deque[_RecordedStep] = deque()
        self._queued_nbytes = 0
        self._is_told = False
        self._beginning: TraceBeginning | None = None
        self._dropped_steps = 0
        # Of the engine thread. Nothing is kept before the first step begins.
        self._asked_step = 0
        self._left_out_step = 0
        self._current: _RecordedStep | None = None

    # ------------------------------------------------------------------ engine thread

    def record(self, event: TraceEvent) -> None:
        """The next event."""
        if isinstance(event, StepEvent):
            self._begin_step(event)
        if self._current is None:
            return
        self._current.events.append(event)
        is_last = isinstance(event, LayerEvent) and event.layer == self._num_layers - 1
        if is_last and not self._wish.layer_input:
            self._hand_over(self._current)

    def wanted(self, start: StepStart) -> WantedSamples | None:
        """Which hidden states of the step that begins."""
        self._asked_step = start.step
        if self._is_full():
            self._left_out_step = start.step
            return None
        if not self._wish.max_rows:
            return None
        return WantedSamples(self._wish.max_rows, self._wish.layer_input, self._wish.router_input, routing=False)

    def take(self, sample: LayerSample) -> None:
        """One layer's hidden states."""
        if self._current is None:
            return
        self._current.samples[sample.layer, sample.kind] = sample
        if sample.layer == self._num_layers:
            self._hand_over(self._current)

    def _begin_step(self, event: StepEvent) -> None:
        if self._beginning is None and self._wish.max_rows and self._asked_step != event.step:
            return  # opened between the observer's beginning of this step and the cache's: the next one is whole
        if self._current is not None:
            # A step that failed half way, or what the cache noticed between two steps; that goes with the next one.
            if any(isinstance(earlier, StepEvent) for earlier in self._current.events):
                self._hand_over(self._current)
        elif self._beginning is None:
            self._beginning = TraceBeginning(self._snapshot(), event.at_s, time.time())  # unix_s
        if self._left_out_step == event.step or self._is_full():
            self._dropped_steps += 1
            self._current = None
        elif self._current is None:
            self._current = _RecordedStep()

    def _is_full(self) -> bool:
        with self._lock:
            return self._queued_nbytes >= QUEUE_NBYTES

    def _hand_over(self, step: _RecordedStep) -> None:
        """The step is over; what comes before the next one begins belongs to that."""
        step.weigh()
        with self._lock:
            self._queue.append(step)
            self._queued_nbytes += step.nbytes
            is_told, self._is_told = self._is_told, True
        self._current = _RecordedStep()
        if not is_told:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake.set)

    # ------------------------------------------------------------------ event loop

    def close(self) -> None:
        """Ends `batches`."""
        self._is_closed = True
        self._wake.set()

    async def beginning(self) -> TraceBeginning:
        """As soon as the first recorded step is over; raises Unavailable when it was closed before."""
        await self._wake.wait()
        if self._beginning is None:
            raise Unavailable("The trace was closed before its first step.")
        return self._beginning

    async def batches(self, convert: Callable[[TraceBatch], _Converted]) -> AsyncIterator[_Converted]:
        """Whole steps, a few together or a large one in parts; ends when the recording is closed.

        Args:
            convert: what becomes of a batch; called in a worker thread, where waiting for the device is allowed.
        """
        while not self._is_closed:
            await self._wake.wait()
            # Python runs one thread at a time: every turn of ours costs the engine's thread one of its own.
            await asyncio.sleep(_PAUSE_S)
            self._wake.clear()
            while not self._is_closed and (steps := self._take_steps()):
                for converted in await asyncio.to_thread(self._convert, steps, convert):
                    yield converted

    def _take_steps(self) -> list[_RecordedStep]:
        """As many as make a batch, at least one where there is one."""
        steps: list[_RecordedStep] = []
        nbytes = 0
        with self._lock:
            while self._queue and nbytes < BATCH_NBYTES:
                steps.append(self._queue.popleft())
                nbytes += steps[-1].nbytes
            self._queued_nbytes -= nbytes
            self._is_told = bool(self._queue)
        return steps

    def _convert(self, steps: list[_RecordedStep], convert: Callable[[TraceBatch], _Converted]) -> list[_Converted]:
        batches: list[list[TraceEvent]] = [[]]
        nbytes = 0
        for step in steps:
            for event in step.finished_events(self._num_layers):
                if nbytes >= BATCH_NBYTES:
                    batches.append([])
                    nbytes = 0
                if isinstance(event, LayerEvent):
                    nbytes += step.nbytes // self._num_layers
                batches[-1].append(event)
        return [convert(TraceBatch(tuple(events), self._dropped_steps)) for events in batches]


class TraceRecorder:
    """A sink of the expert cache and a sampler of the layer observer, which is told of each step before the cache.

    Args:
        num_layers: MoE layers.
        snapshot: of the expert cache.
    """

    def __init__(self, num_layers: int, snapshot: Callable[[], CacheSnapshot]) -> None:
        self._num_layers = num_layers
        self._snapshot = snapshot
        # Set by the event loop, read by the engine thread; one reference, so that no lock is needed.
        self._recording: Recording | None = None

    @property
    def is_recording(self) -> bool:
        """Somebody reads a trace."""
        return self._recording is not None

    def record(self, event: TraceEvent) -> None:
        """The cache's sink."""
        recording = self._recording
        if recording is not None:
            recording.record(event)

    def begin_step(self, start: StepStart) -> WantedSamples | None:
        """See LayerSampler."""
        recording = self._recording
        return None if recording is None else recording.wanted(start)

    def take(self, sample: LayerSample) -> None:
        """See LayerSampler."""
        recording = self._recording
        if recording is not None:
            recording.take(sample)

    def open(self, wish: TraceWish) -> Recording:
        """Records from the next step on. Call it, and `close`, on the event loop.

        Raises:
            Overloaded: a trace is being recorded.
        """
        if self._recording is not None:
            raise Overloaded("A trace is being recorded already; one at a time.", _RETRY_AFTER_MS)
        self._recording = Recording(wish, self._num_layers, self._snapshot)
        return self._recording

    def close(self, recording: Recording) -> None:
        """Ends the recording at once; idempotent."""
        recording.close()
        if self._recording is recording:
            self._recording = None
