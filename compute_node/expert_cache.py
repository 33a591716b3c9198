"""The expert cache: device slots, what they hold, and what gives way.

Knows slots and experts, not tensors of hidden states. Owned by the engine thread; the store client's thread enters
through `blob_retired` only. Slot states:

            acquire (miss)            last chunk issued
    FREE ───────────────────► LOADING ─────────────────► READY
     ▲                           │                         │
     └───── load failed ─────────┴──── evict, retire ──────┘

A pinned slot never leaves READY. Experts are immutable, so eviction is forgetting.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch

from compute_node.device.cpu import DONE
from compute_node.device.seam import CopyTicket, Device
from compute_node.eviction import Eviction, SlotHistory
from compute_node.loads import Load, LoadState, Transfers
from promoe.errors import Unavailable
from promoe.ids import ExpertId

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of an expert cache."""

    num_layers: int
    num_experts: int
    slots_per_layer: int
    blob_nbytes: int

    @property
    def cache_rate(self) -> float:
        """Device slots divided by all experts."""
        return self.slots_per_layer / self.num_experts


@dataclass(frozen=True)
class CachePolicy:
    """How the cache behaves.

    Attributes:
        eviction: chooses the slot that gives way.
        serial: waits for a layer's loads before the first expert is handed out: the oracle of the overlapped loop.
    """

    eviction: Eviction
    serial: bool = False


class SlotState(Enum):
    """See the module's diagram."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"


@dataclass(eq=False)
class Slot:
    """One expert-sized buffer on the device.

    Attributes:
        index: row of the slots tensor.
        address: of the row, on the device.
        history: what eviction looks at; None when FREE.
        pins: layers' acquisitions that read it.
        last_compute: compute that may still read it.
        doomed: its blob was retired while it was in use; it is forgotten at its release.
    """

    index: int
    address: int
    state: SlotState = SlotState.FREE
    history: SlotHistory | None = None
    load: Load | None = None
    pins: int = 0
    last_compute: CopyTicket = DONE
    doomed: bool = False


@dataclass
class LayerCounters:
    """Since the start, for one layer."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class LayerOccupancy:
    """Slots of one layer by state."""

    resident: int
    loading: int


@dataclass
class Acquisition:
    """One layer's use of its experts in one step: what was there, what had to come, and how long compute waited.

    Iterate `arrivals()` once, inside `ExpertCache.acquire`.

    Attributes:
        hits: needed experts that were READY when the routing became known.
        misses: the others, in the order they are loaded.
        stall_s: time the engine thread waited for loads.
        loaded_nbytes: bytes asked from the transfer engine.
        late: those of `misses` whose load was under way when the routing became known.
        late_stall_s: the part of `stall_s` that was spent on `late` ones.
        pinned: slots by expert; the cache's business.
    """

    layer: int
    hits: tuple[int, ...]
    misses: tuple[int, ...]
    stall_s: float = 0.0
    loaded_nbytes: int = 0
    late: tuple[int, ...] = ()
    late_stall_s: float = 0.0
    pinned: dict[int, Slot] = field(default_factory=dict)


class ExpertCache:
    """Slots for every MoE layer, an equal share each.

    Args:
        slots_SB: uint8 tensor (num_moe_layers * slots_per_layer, slot bytes) on the device.
        geometry: the cache's sizes.
        device: marks compute, so that a slot is overwritten only after it was read.
        transfers: loads experts.
        source_address: where an expert's blob lies in the mapped arena; raises Unavailable if it is not there.
        policy: which slot gives way, and whether loading and compute overlap.
    """

    def __init__(
        self,
        slots_SB: torch.Tensor,
        geometry: CacheGeometry,
        device: Device,
        transfers: Transfers,
        source_address: Callable[[ExpertId], int],
        policy: CachePolicy,
    ) -> None:
        assert slots_SB.shape[0] == geometry.num_layers * geometry.slots_per_layer, "every layer has its slots"
        self.geometry = geometry
        self.slots_SB = slots_SB
        self._device = device
        self._transfers = transfers
        self._source_address = source_address
        self._policy = policy
        self._lock = threading.Condition(threading.RLock())
        self._clock = 0
        self._computing_thread: int | None = None
        rows = [Slot(index, slots_SB[index].data_ptr()) for index in range(slots_SB.shape[0])]
        share = geometry.slots_per_layer
        self._slots = [rows[layer * share : (layer + 1) * share] for layer in range(geometry.num_layers)]
        self._slot_of: list[dict[int, Slot]] = [{} for _ in range(geometry.num_layers)]
        self.counters = [LayerCounters() for _ in range(geometry.num_layers)]

    @contextmanager
    def acquire(self, layer: int, needed: Sequence[int]) -> Iterator[Acquisition]:
        """Pins what is READY, queues loads for what is not, and releases everything at the end.

        Args:
            layer: MoE layer.
            needed: the routed experts, each once.

        Raises:
            Unavailable: an expert cannot be had; the step fails, the cache stays whole.
        """
        self._follow_compute()
        with self._lock:
            slot_of = self._slot_of[layer]
            hits = tuple(e for e in needed if e in slot_of and slot_of[e].state is SlotState.READY)
            missing = tuple(e for e in needed if e not in slot_of)
            assert len(hits) + len(missing) == len(needed), "between steps no slot is LOADING"
            acquisition = Acquisition(layer, hits, missing)
            for expert in hits:
                self._pin(acquisition, slot_of[expert])
            self.counters[layer].hits += len(hits)
            self.counters[layer].misses += len(missing)
        try:
            yield acquisition
        finally:
            self._release_all(acquisition)

    def arrivals(self, acquisition: Acquisition) -> Iterator[tuple[int, int]]:
        """Hands out (expert, slot index) as they can be computed: READY ones first, then in order of arrival.

        The slot stays pinned until the next item is asked for. A layer that needs more experts than it has slots is
        streamed: what was computed gives way to what is missing.
        """
        waiting = deque(acquisition.misses)
        loads: deque[Slot] = deque()
        ready = deque(acquisition.hits)
        self._load_more(acquisition, waiting, loads)
        if self._policy.serial:
            self._await_all(acquisition, loads, ready)
        while ready or loads:
            expert = ready.popleft() if ready else self._await_next(acquisition, loads)
            yield expert, acquisition.pinned[expert].index
            if waiting:
                self._release(acquisition, expert)
                self._load_more(acquisition, waiting, loads)
                if self._policy.serial:
                    self._await_all(acquisition, loads, ready)
        assert not waiting, "one computed expert frees one slot, so everything was loaded"

    def warm(self) -> None:
        """Fills every free slot with the layer's first experts, so that service starts with a full cache."""
        for layer in range(self.geometry.num_layers):
            experts = range(min(self.geometry.slots_per_layer, self.geometry.num_experts))
            try:
                with self.acquire(layer, experts) as acquisition:
                    for _ in self.arrivals(acquisition):
                        pass
            except Unavailable as error:
                logger.warning("MoE layer %d starts without all of its experts: %s", layer, error)
        self.restart_counters()
        self._device.synchronize()

    def restart_counters(self) -> None:
        """Forgets what was counted, not what is held."""
        self.counters = [LayerCounters() for _ in self.counters]

    def occupancy(self, layer: int) -> LayerOccupancy:
        """What the layer's slots hold now."""
        with self._lock:
            states = [slot.state for slot in self._slots[layer]]
        return LayerOccupancy(states.count(SlotState.READY), states.count(SlotState.LOADING))

    def blob_retired(self, expert: ExpertId) -> None:
        """Forgets the expert; returns when no copy reads its blob and no slot made from it will be computed with."""
        with self._lock:
            slot = self._slot_of[expert.layer].get(expert.expert)
            if slot is not None:
                slot.doomed = True
                self._lock.wait_for(lambda: slot.pins == 0 and slot.state is not SlotState.LOADING)
                if slot.doomed and slot.state is SlotState.READY:
                    self._forget(expert.layer, slot)
        # A slot is READY, or even another expert's, as soon as compute was told to wait for the copy: the copy itself
        # may be under way.
        self._device.synchronize()

    def blob_published(self, expert: ExpertId) -> None:
        """Nothing to do: the next miss finds the blob."""

    def check_integrity(self) -> None:
        """Asserts what must hold between steps; called after each test."""
        with self._lock:
            for layer, slots in enumerate(self._slots):
                held = {slot.history.expert.expert: slot for slot in slots if slot.history is not None}
                assert held == self._slot_of[layer], f"the index of layer {layer} says what its slots hold"
                for slot in slots:
                    assert slot.pins == 0, f"nobody holds slot {slot.index} between steps"
                    assert slot.state is not SlotState.LOADING, f"slot {slot.index} is not loading between steps"
                    assert (slot.state is SlotState.FREE) == (slot.history is None), "only FREE slots hold nothing"
                    assert slot.history is None or slot.history.expert.layer == layer, "slots keep to their layer"

    def _follow_compute(self) -> None:
        """A slot is READY for the stream that was told to wait for its copy; another thread computes on another one.

        Start-up changes threads: slots are warmed and the engine is tried in different ones.
        """
        thread = threading.get_ident()
        if thread != self._computing_thread:
            self._device.synchronize()
            self._computing_thread = thread

    # ------------------------------------------------------------------ states

    def _pin(self, acquisition: Acquisition, slot: Slot) -> None:
        assert slot.history is not None, "only a slot that holds an expert is pinned"
        self._clock += 1
        slot.pins += 1
        slot.history.last_use = self._clock
        slot.history.num_uses += 1
        acquisition.pinned[slot.history.expert.expert] = slot

    def _load_more(self, acquisition: Acquisition, waiting: deque[int], loads: deque[Slot]) -> None:
        """Starts loading as many of `waiting` as there are slots to be had."""
        if not waiting:
            return
        started: list[Load] = []
        with self._lock:
            while waiting and (slot := self._take_slot(acquisition.layer)) is not None:
                expert = ExpertId(acquisition.layer, waiting[0])
                source_address = self._source_address(expert)
                waiting.popleft()
                load = Load(expert, source_address, slot.address, self.geometry.blob_nbytes, slot.last_compute, DONE)
                slot.state, slot.load = SlotState.LOADING, load
                slot.history = SlotHistory(expert)
                self._slot_of[expert.layer][expert.expert] = slot
                self._pin(acquisition, slot)
                loads.append(slot)
                started.append(load)
        acquisition.loaded_nbytes += len(started) * self.geometry.blob_nbytes
        self._transfers.submit(started)

    def _take_slot(self, layer: int) -> Slot | None:
        """A FREE slot, or one that the policy evicts, or None when all are pinned."""
        candidates: list[SlotHistory] = []
        for slot in self._slots[layer]:
            if slot.state is SlotState.FREE:
                return slot
            if slot.pins == 0 and slot.history is not None:
                candidates.append(slot.history)
        if not candidates:
            return None
        victim = self._policy.eviction(candidates)
        slot = self._slot_of[layer][victim.expert.expert]
        self._forget(layer, slot)
        self.counters[layer].evictions += 1
        return slot

    def _forget(self, layer: int, slot: Slot) -> None:
        assert slot.history is not None, "a FREE slot holds nothing to forget"
        assert slot.pins == 0, "a pinned slot never leaves READY"
        del self._slot_of[layer][slot.history.expert.expert]
        slot.state, slot.history, slot.load, slot.doomed = SlotState.FREE, None, None, False

    def _await_next(self, acquisition: Acquisition, loads: deque[Slot]) -> int:
        """Blocks until the first of `loads` arrives, takes it from there and returns its expert."""
        pending = [slot.load for slot in loads if slot.load is not None]
        started_s = time.perf_counter()
        load = self._transfers.next_issued(pending)
        load.ticket.wait_on_compute()
        acquisition.stall_s += time.perf_counter() - started_s
        slot = acquisition.pinned[load.expert.expert]
        with self._lock:
            slot.state = SlotState.READY
            slot.load = None
            loads.remove(slot)
        return load.expert.expert

    def _await_all(self, acquisition: Acquisition, loads: deque[Slot], ready: deque[int]) -> None:
        while loads:
            ready.append(self._await_next(acquisition, loads))

    def _release(self, acquisition: Acquisition, expert: int) -> None:
        slot = acquisition.pinned.pop(expert)
        slot.last_compute = self._device.mark_compute()
        with self._lock:
            self._unpin(acquisition.layer, slot)

    def _release_all(self, acquisition: Acquisition) -> None:
        """Ends the layer's pins; loads that nobody will compute with any more are dropped or awaited."""
        unfinished = [slot.load for slot in acquisition.pinned.values() if slot.load is not None]
        if unfinished:
            self._transfers.pause(unfinished)
            self._transfers.settle(unfinished)
        mark = self._device.mark_compute()
        with self._lock:
            for slot in acquisition.pinned.values():
                slot.last_compute = mark
                if slot.load is not None:
                    self._settle(slot, slot.load)
                self._unpin(acquisition.layer, slot)
            acquisition.pinned.clear()

    def _settle(self, slot: Slot, load: Load) -> None:
        """A load that was not waited for: it arrived (keep it) or it did not (forget it at the unpin)."""
        if load.state is LoadState.ISSUED:
            load.ticket.wait_on_host()
        else:
            slot.doomed = True
        slot.state, slot.load = SlotState.READY, None

    def _unpin(self, layer: int, slot: Slot) -> None:
        slot.pins -= 1
        assert slot.pins >= 0, "pins are released once"
        if slot.pins == 0:
            if slot.doomed:
                self._forget(layer, slot)
            self._lock.notify_all()
