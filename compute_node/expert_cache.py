"""The expert cache: what a layer needs is pinned or loaded, what it will need is loaded ahead, the rest gives way.

Knows slots and experts, not tensors of hidden states. Every decision is made on the engine thread, at the points where
it looks around: a step begins, a decoder layer begins, a routing becomes known, compute has to wait, the last layer is
over. Hints and arrived loads wait for the next look; so the order of what was noticed determines what is decided, and a
trace of it can be replayed. The store client's thread enters through `blob_retired` only.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from compute_node.acquisition import Acquisition
from compute_node.eviction import WorthBy, eviction_named
from compute_node.expert_feed import ComputeMarks, ExpertFeed, FeedParts
from compute_node.expert_history import ExpertHistory
from compute_node.hint_inbox import HintInbox
from compute_node.loads import Load, LoadState, Transfers
from compute_node.prefetch import Prefetcher
from compute_node.prefetch_counters import PrefetchCounters
from compute_node.schedule import HintUse, SchedulePolicy
from compute_node.slots import CacheGeometry, Slot, SlotState, SlotTable
from promoe.errors import Unavailable
from promoe.hint import Hint, IdArray, StepStart
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LoadEvent, StepEvent, TraceEvent

logger = logging.getLogger(__name__)


@dataclass
class LayerCounters:
    """Since the start, for one layer."""

    hits: int = 0
    misses: int = 0


@dataclass(frozen=True)
class LayerOccupancy:
    """Slots of one layer's experts by state."""

    resident: int
    loading: int


@dataclass(frozen=True)
class CacheSnapshot:
    """Where a replay starts: per slot `layer * num_experts + expert` or -1, and what eviction remembers."""

    resident: list[int]
    history_json: str


@dataclass(frozen=True)
class CacheSurroundings:
    """What the cache works with.

    Attributes:
        marks: so that a slot is overwritten only after it was read.
        transfers: move experts.
        source_address: where an expert's blob lies in the mapped arena; raises Unavailable if it is not there.
        hints: where received hints wait.
        clock: seconds; real, or a replay's.
        wait_begins: see `Device`.
    """

    marks: ComputeMarks
    transfers: Transfers
    source_address: Callable[[ExpertId], int]
    hints: HintInbox
    clock: Callable[[], float] = time.perf_counter
    wait_begins: Callable[[], None] = lambda: None


class ExpertCache:
    """Slots for the experts of every MoE layer.

    Args:
        slot_addresses: of `geometry.num_slots` slots on the device.
        geometry: the cache's sizes.
        policy: how slots are filled and given up.
        surroundings: device, link, arena, hints and clock.

    Attributes:
        sinks: told, on the engine thread, of everything the cache takes notice of; they are quick and never raise.
    """

    def __init__(
        self,
        slot_addresses: Sequence[int],
        geometry: CacheGeometry,
        policy: SchedulePolicy,
        surroundings: CacheSurroundings,
    ) -> None:
        self.geometry = geometry
        self.policy = policy
        self._marks = surroundings.marks
        self._transfers = surroundings.transfers
        self._source_address = surroundings.source_address
        self._hints = surroundings.hints
        self._clock = surroundings.clock
        self._idle = surroundings.marks.mark_compute()
        self._lock = threading.Condition(threading.RLock())
        self._computing_thread: int | None = None
        self._history = ExpertHistory(geometry.num_layers, geometry.num_experts, geometry.experts_per_token)
        self._table = SlotTable(
            slot_addresses,
            geometry,
            policy.slot_split,
            WorthBy(eviction_named(policy.eviction), self._history),
            self._idle,
        )
        self._prefetcher = Prefetcher(policy, self._table, self._history, self._transfers, self._new_load)
        self.sinks: list[Callable[[TraceEvent], None]] = []
        self.counters = [LayerCounters() for _ in range(geometry.num_layers)]
        self._step = 0
        self._look = 0
        self._feed = ExpertFeed(
            FeedParts(
                table=self._table,
                history=self._history,
                prefetcher=self._prefetcher,
                transfers=self._transfers,
                marks=self._marks,
                clock=self._clock,
                lock=self._lock,
                new_load=self._new_load,
                arrive=self._arrive,
                stop=self._stop,
                look_around=self.notice,
                wait_begins=surroundings.wait_begins,
            ),
            policy,
        )

    # ------------------------------------------------------------------ what is told from outside

    @property
    def prefetch_counters(self) -> PrefetchCounters:
        """What became of prefetched bytes."""
        return self._prefetcher.counters

    @property
    def evictions(self) -> list[int]:
        """By layer, since the start."""
        return [self._table.evictions[layer] for layer in range(self.geometry.num_layers)]

    def is_prefetching(self, layer: int) -> bool:
        """False while prefetching for this layer is switched off because it cost more than it saved."""
        return self.policy.hints is not HintUse.IGNORE and self._prefetcher.worth.is_on(layer)

    def begin_step(self, start: StepStart) -> None:
        """A forward pass begins, whose tokens are these spans'."""
        is_prefill = any(span.is_prefill for span in start.spans)
        with self._lock:
            self._step, self._look = start.step, 0
            self._prefetcher.begin_step(is_prefill)
            rate = self._prefetcher.link_bytes_per_s
            self._tell(StepEvent(self._clock(), start.step, start.spans, start.ended_request_ids, rate))
            self._history.begin_step(max(1, start.num_tokens), max(1, len(start.spans)))
            for hint in self._prefetcher.book.begin_step(start.step):
                self._apply(hint)
            self._look_around()

    def notice(self) -> None:
        """A look around: hints, arrivals, and what to load next. Cheap when there is nothing new."""
        with self._lock:
            self._look_around()

    def snapshot(self) -> CacheSnapshot:
        """What the slots hold and what eviction remembers: a replay that starts from it decides alike.

        So everything else is given up: loads that nobody waits for, hints, and what was measured. Between steps, or
        while a step's event is told.
        """
        with self._lock:
            self._prefetcher.start_over()
            resident = [
                slot.expert.layer * self.geometry.num_experts + slot.expert.expert
                if slot.expert is not None and slot.state is SlotState.READY
                else -1
                for slot in self._table.slots
            ]
            return CacheSnapshot(resident, self._history.to_json())

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Puts an unused cache into a snapshot's state, without loading anything: for replays.

        Raises:
            ValueError: the snapshot is of another geometry.
        """
        if len(snapshot.resident) != len(self._table.slots):
            raise ValueError(f"the snapshot has {len(snapshot.resident)} slots, the cache {len(self._table.slots)}")
        with self._lock:
            self._table.fill(snapshot.resident)
            self._history.load_json(snapshot.history_json)

    # ------------------------------------------------------------------ a layer's use

    @contextmanager
    def acquire(self, layer: int, needed: Sequence[int], topk_ids_TK: IdArray) -> Iterator[Acquisition]:
        """Pins what is READY, makes demand loads of what is not, and releases everything at the end.

        Args:
            layer: MoE layer.
            needed: the routed experts, each once.
            topk_ids_TK: the routing they come from.

        Raises:
            Unavailable: an expert cannot be had; the step fails, the cache stays whole.
        """
        self._follow_compute()
        routed_s = self._clock()
        with self._lock:
            self._take_notice(looks_for_hints=False)  # what came just now is early enough a little later
            self._prefetcher.pace.routed(layer, routed_s)
            acquisition = self._feed.open(layer, needed)
            self.counters[layer].hits += len(acquisition.hits)
            self.counters[layer].misses += len(acquisition.misses)
            used = (*acquisition.hits, *acquisition.misses)
            self._history.routed(layer, used, self._token_shares(topk_ids_TK), topk_ids_TK.shape[0])
            self._prefetcher.book.routed(layer)
            self._prefetcher.worth.visited(layer)
            if self.policy.early_preemption:
                self._stop(self._prefetcher.unneeded(layer))
        try:
            self._feed.demand(acquisition)
            yield acquisition
        finally:
            self._feed.close(acquisition)
            self._prefetcher.released()
            self._prefetcher.pace.stalled(acquisition.stall_s)
            self._tell(acquisition.event(self._step, topk_ids_TK, routed_s, self._clock()))
            if layer == self.geometry.num_layers - 1:
                self.notice()  # the next look is the next step's, and the link should have work until then

    def arrivals(self, acquisition: Acquisition) -> Iterator[tuple[int, int]]:
        """Hands out (expert, slot index) as they can be computed, in the policy's order; see `ExpertFeed.arrivals`."""
        is_first = True
        for expert, slot_index in self._feed.arrivals(acquisition):
            yield expert, slot_index
            if is_first:
                # A sample of the layer that was still on its way to the host.
                self._hints.flush()
                is_first = False

    def warm(self) -> None:
        """Fills the slots with every layer's first experts, so that service starts with a full cache."""
        sinks, self.sinks = self.sinks, []
        experts = range(min(self.geometry.slots_per_layer, self.geometry.num_experts))
        for layer in range(self.geometry.num_layers):
            try:
                with self.acquire(layer, experts, np.array([experts], dtype=np.uint16)) as acquisition:
                    for _ in self.arrivals(acquisition):
                        pass
            except Unavailable as error:
                logger.warning("MoE layer %d starts without all of its experts: %s", layer, error)
        self.restart_counters()
        self._history.reset()
        self._marks.synchronize()
        self.sinks = sinks

    def restart_counters(self) -> None:
        """Forgets what was counted, not what is held."""
        self.counters = [LayerCounters() for _ in self.counters]
        self._table.evictions.clear()

    def occupancy(self, layer: int) -> LayerOccupancy:
        """What the layer's experts are doing now."""
        with self._lock:
            states = [slot.state for slot in self._table.held(layer)]
        return LayerOccupancy(states.count(SlotState.READY), states.count(SlotState.LOADING))

    def resident_states(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """By layer and expert: bit 0 resident, bit 1 loading, bit 2 hinted for the layer's next visit."""
        with self._lock:
            states_LE = self._table.states_LE()
            for layer in range(self.geometry.num_layers):
                hint = self._prefetcher.book.hint_for(layer)
                if hint is not None:
                    states_LE[layer, hint.experts[: hint.num_expected]] |= 4
        return states_LE

    def blob_retired(self, expert: ExpertId) -> None:
        """Forgets the expert; returns when no copy reads its blob and no slot made from it will be computed with."""
        with self._lock:
            in_use = self._table.find(expert)
            if in_use is not None and in_use.pins:
                in_use.doomed = True
                self._lock.wait_for(lambda: in_use.pins == 0 or in_use.expert != expert)  # or another's already
            slot = self._table.find(expert)
            if slot is not None:
                load = slot.load
                if load is not None:
                    self._prefetcher.stop([slot])
                    self._transfers.settle([load])
                    self._prefetcher.unwatch(slot)
                if slot.expert == expert:
                    self._table.forget(slot)
            self._transfers.settle_expert(expert)
        # A slot is READY, or another's already, as soon as compute was told to wait for the copy, which goes on.
        self._marks.synchronize()

    def blob_published(self, expert: ExpertId) -> None:
        """Nothing to do: the next load finds the blob."""

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; called after each test."""
        with self._lock:
            self._table.check_integrity()
            for slot in self._table.slots:
                assert slot.pins == 0, f"nobody holds slot {slot.index} between steps"

    # ------------------------------------------------------------------ looking around

    def _look_around(self) -> None:
        self._take_notice()
        self._prefetcher.top_up()

    def _take_notice(self, looks_for_hints: bool = True) -> None:
        """Hints first: they cost nothing to know. Everything noticed in one look carries its number."""
        self._transfers.catch_up()
        for received in self._hints.drain(looks_for_hints):
            hint = received.hint
            fate = self._prefetcher.book.file(hint)
            if fate is HintFate.TAKEN:
                self._apply(self._prefetcher.book.hint_for(hint.layer) or hint)  # joined with a canary's
            self._tell(HintEvent(self._clock(), hint, fate, received.latency_s, self._look))
        for slot in self._prefetcher.arrivals():
            assert slot.load is not None, "an arrival has its load"
            if slot.load.state is not LoadState.FAILED:
                self._arrive(slot, slot.load)
            elif slot.pins == 0:
                # Who needs it asks again, and hears why it cannot be had.
                self._table.forget(slot)
        self._look += 1

    def _apply(self, hint: Hint) -> None:
        """What a hint means to eviction; what was expected of the token before says nothing about a prompt."""
        if self._prefetcher.is_prefill and hint.observed_step < hint.step == self._step:
            return
        if self.policy.hints is HintUse.BUDGETED:
            self._history.hinted(hint.layer, hint.experts.tolist(), hint.scores.tolist())
        elif self.policy.hints is HintUse.TOP:
            head = hint.experts[: hint.num_expected].tolist()
            self._history.touched(hint.layer, [e for e in head if e in self._table.slot_of[hint.layer]])

    def _arrive(self, slot: Slot, load: Load) -> None:
        self._table.arrived(slot)
        now_s = self._clock()
        self._tell(LoadEvent(now_s, load.begin_s, load.end_s, load.expert, load.reason, load.nbytes, self._look))

    def _stop(self, slots: Sequence[Slot]) -> None:
        """Takes prefetches off the link's queue."""
        for slot in self._prefetcher.stop(slots):
            load = slot.load
            assert load is not None, "what is kept is a part of a load"
            kept_nbytes = slot.kept_nbytes or 0
            now_s = self._clock()
            event = LoadEvent(now_s, load.begin_s, now_s, load.expert, load.reason, kept_nbytes, self._look, True)
            self._tell(event)

    def _tell(self, event: TraceEvent) -> None:
        for sink in self.sinks:
            sink(event)

    def _new_load(self, expert: ExpertId, slot: Slot) -> Load:
        source_address = self._source_address(expert)
        return Load(expert, source_address, slot.address, self.geometry.blob_nbytes, slot.last_compute, self._idle)

    def _follow_compute(self) -> None:
        """A slot is READY for the stream that was told to wait for its copy; another thread computes on another one.

        Start-up changes threads: slots are warmed and the engine is tried in different ones.
        """
        thread = threading.get_ident()
        if thread != self._computing_thread:
            self._marks.synchronize()
            self._computing_thread = thread

    def _token_shares(self, topk_ids_TK: IdArray) -> list[float] | None:
        """The share of tokens that were routed to each expert; None for a single token."""
        if topk_ids_TK.shape[0] == 1:
            return None
        counts: list[int] = np.bincount(topk_ids_TK.ravel(), minlength=self.geometry.num_experts).tolist()
        return [count / topk_ids_TK.shape[0] for count in counts]
