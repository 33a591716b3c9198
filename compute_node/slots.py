"""The slots: which holds what, in which state, and which gives way. Knows no threads, no link and no tensors.

            load submitted             arrived
    FREE ───────────────────► LOADING ─────────► READY
     ▲                           │                 │
     └── given up, load failed ──┴──── evicted ────┘

A pinned slot is never given up. Experts are immutable, so eviction is forgetting. A LOADING slot whose load is paused
keeps the bytes that have come, and may be given up like a READY one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

import numpy as np

from compute_node.copy_ticket import CopyTicket
from compute_node.eviction import Scores
from compute_node.loads import Load
from compute_node.schedule import SlotSplit
from promoe.ids import ExpertId

FEW_VICTIMS: Final = 16
"""Slots are given up a few at a time before scores change."""


@dataclass(frozen=True)
class CacheGeometry:
    """Sizes of an expert cache."""

    num_layers: int
    num_experts: int
    slots_per_layer: int
    blob_nbytes: int
    experts_per_token: int

    @property
    def cache_rate(self) -> float:
        """Device slots divided by all experts."""
        return self.slots_per_layer / self.num_experts

    @property
    def num_slots(self) -> int:
        """Over all layers."""
        return self.num_layers * self.slots_per_layer


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
        last_compute: compute that may still read it.
        expert: what it holds, or will hold; None when FREE.
        load: on its way; None when READY or FREE.
        pins: acquisitions that use it.
        doomed: its blob was retired, or its load failed, while it was in use; it is given up at its release.
        is_speculative: loaded before anybody needed it, and not needed yet.
        is_streamed: it was loaded as the next layer of a prefill, not for a hint.
        kept_nbytes: of a load that was taken off the link's queue half way; None when its load is not paused.
    """

    index: int
    address: int
    last_compute: CopyTicket
    state: SlotState = SlotState.FREE
    expert: ExpertId | None = None
    load: Load | None = None
    pins: int = 0
    doomed: bool = False
    is_speculative: bool = False
    is_streamed: bool = False
    kept_nbytes: int | None = None


class Scoring(Protocol):
    """What experts are worth."""

    @property
    def epoch(self) -> int:
        """Changes whenever scores may have, but for those of experts that are hinted or being loaded."""

    def __call__(self, layers: slice) -> Scores:
        """Of the experts of these layers, (layers, E)."""

    def of(self, expert: ExpertId) -> float:
        """Of one expert."""


@dataclass(frozen=True)
class _Victims:
    """Experts as numbers in their pool and their scores, worth least last."""

    epoch: int
    order: list[tuple[int, float]]


class SlotTable:
    """All slots of a cache.

    Args:
        addresses: of the slots, on the device.
        geometry: the cache's sizes.
        split: whether a layer may use another's slots.
        score: of the experts of some layers, (layers, E): what is worth least is given up first.
        idle: a mark of compute that is done.

    Attributes:
        slot_of: by layer and expert, the slot that holds it or is being loaded with it; to be read only.
        evictions: by the layer of the expert that was given up for another.
        on_given_up: told of every slot before it is forgotten.
    """

    def __init__(
        self,
        addresses: Sequence[int],
        geometry: CacheGeometry,
        split: SlotSplit,
        score: Scoring,
        idle: CopyTicket,
    ) -> None:
        assert len(addresses) == geometry.num_slots, "every layer has its slots"
        self.geometry = geometry
        self.slots = [Slot(index, address, idle) for index, address in enumerate(addresses)]
        self._split = split
        self._score = score
        num_pools = geometry.num_layers if split is SlotSplit.LAYER else 1
        share = len(self.slots) // num_pools
        self._free = [self.slots[pool * share : (pool + 1) * share][::-1] for pool in range(num_pools)]
        self.slot_of: list[dict[int, Slot]] = [{} for _ in range(geometry.num_layers)]
        self._may_go_LE = np.zeros((geometry.num_layers, geometry.num_experts), dtype=bool)
        # By pool: what may be given up, worth most first; see `_least_worth`.
        self._victims: dict[int, _Victims] = {}
        self.evictions = Counter[int]()
        self.on_given_up: Callable[[Slot], None] = lambda slot: None

    def find(self, expert: ExpertId) -> Slot | None:
        """The slot that holds the expert, or is being loaded with it."""
        return self.slot_of[expert.layer].get(expert.expert)

    def held(self, layer: int) -> list[Slot]:
        """The layer's slots that are not FREE."""
        return list(self.slot_of[layer].values())

    def ready(self, layer: int) -> tuple[int, ...]:
        """The layer's experts that are READY."""
        return tuple(expert for expert, slot in self.slot_of[layer].items() if slot.state is SlotState.READY)

    def take(self, layer: int, may_go: Callable[[ExpertId], bool] | None = None) -> Slot | None:
        """A FREE slot for an expert of this layer, or the one worth least, given up for it; None when there is none.

        Args:
            layer: whose expert it is for.
            may_go: whether the one worth least may be given up for this; None: it may.
        """
        pool = self.pool_of(layer)
        if self._free[pool]:
            return self._free[pool].pop()
        victim = self._least_worth(pool)
        if victim is None or (may_go is not None and not may_go(victim)):
            return None
        slot = self.slot_of[victim.layer][victim.expert]
        self.forget(slot)
        self.evictions[victim.layer] += 1
        return self._free[pool].pop()

    def pool_of(self, layer: int) -> int:
        """The slots that this layer's experts may use, as a number."""
        return layer if self._split is SlotSplit.LAYER else 0

    def may_use(self, layer: int, slot: Slot) -> bool:
        """Whether the slot can hold this layer's experts."""
        return self._split is SlotSplit.GLOBAL or self._pool_of(slot) == layer

    def place(self, slot: Slot, load: Load) -> None:
        """A FREE slot that was taken begins to be loaded."""
        expert = load.expert
        assert slot.state is SlotState.FREE, "only a FREE slot is loaded"
        assert expert.expert not in self.slot_of[expert.layer], "an expert is in one slot"
        slot.state, slot.expert, slot.load = SlotState.LOADING, expert, load
        self.slot_of[expert.layer][expert.expert] = slot

    def give_back(self, slot: Slot) -> None:
        """A slot that was taken and not placed is FREE again."""
        assert slot.state is SlotState.FREE, "only an unused slot is given back"
        self._free[self._pool_of(slot)].append(slot)

    def arrived(self, slot: Slot) -> None:
        """Its load is over."""
        slot.state, slot.load, slot.kept_nbytes = SlotState.READY, None, None
        self.update(slot)

    def forget(self, slot: Slot) -> None:
        """The slot is FREE."""
        assert slot.expert is not None, "a FREE slot holds nothing to forget"
        assert slot.pins == 0, "a pinned slot is never given up"
        self.on_given_up(slot)
        del self.slot_of[slot.expert.layer][slot.expert.expert]
        self._may_go_LE[slot.expert] = False
        slot.state, slot.expert, slot.load, slot.kept_nbytes = SlotState.FREE, None, None, None
        slot.doomed = slot.is_speculative = False
        self._free[self._pool_of(slot)].append(slot)

    def fill(self, resident: Sequence[int]) -> None:
        """Puts experts into slots that are all FREE, without loading them: for replays.

        Args:
            resident: per slot `layer * num_experts + expert`, or -1.
        """
        free = {slot.index for pool in self._free for slot in pool}
        assert len(free) == len(self.slots), "only an unused table is filled"
        for slot, number in zip(self.slots, resident, strict=True):
            if number >= 0:
                expert = ExpertId(*divmod(number, self.geometry.num_experts))
                slot.state, slot.expert = SlotState.READY, expert
                self.slot_of[expert.layer][expert.expert] = slot
                self._free[self._pool_of(slot)].remove(slot)
                self.update(slot)

    def pin(self, slot: Slot) -> None:
        """Somebody uses it."""
        assert slot.expert is not None, "only a slot that holds an expert is pinned"
        slot.pins += 1
        self._may_go_LE[slot.expert] = False

    def unpin(self, slot: Slot) -> None:
        """Undoes one `pin`; a doomed slot is forgotten with the last."""
        slot.pins -= 1
        assert slot.pins >= 0, "pins are released once"
        if slot.pins == 0:
            if slot.doomed:
                self.forget(slot)
            else:
                self.update(slot)

    def update(self, slot: Slot) -> None:
        """Notes whether the slot may be given up; call it when its load was paused or goes on."""
        assert slot.expert is not None, "a FREE slot is not given up"
        is_still = slot.state is SlotState.READY or slot.kept_nbytes is not None
        self._may_go_LE[slot.expert] = is_still and slot.pins == 0

    def states_LE(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """By layer and expert: 1 resident, 2 loading, 0 neither."""
        states_LE = np.zeros(self._may_go_LE.shape, np.uint8)
        for slot in self.slots:
            if slot.expert is not None:
                states_LE[slot.expert] = 1 if slot.state is SlotState.READY else 2
        return states_LE

    def check_integrity(self) -> None:
        """Asserts what must hold at any time; called after each test."""
        free = [slot for pool in self._free for slot in pool]
        assert len({slot.index for slot in free}) == len(free), "a slot is FREE once"
        for slot in self.slots:
            assert (slot in free) == (slot.state is SlotState.FREE), f"slot {slot.index} is in the list of FREE ones"
            assert (slot.state is SlotState.FREE) == (slot.expert is None), "only FREE slots hold nothing"
            assert (slot.state is SlotState.LOADING) == (slot.load is not None), "only LOADING slots have a load"
            assert slot.pins == 0 or slot.expert is not None, "only what holds an expert is pinned"
            if slot.expert is not None:
                assert self.find(slot.expert) is slot, f"the index finds {slot.expert} in slot {slot.index}"
                may_go = bool(self._may_go_LE[slot.expert])
                assert not (may_go and slot.pins), f"slot {slot.index} is pinned and cannot be given up"
                assert may_go or slot.pins or slot.state is SlotState.LOADING, f"slot {slot.index} can be given up"
        for layer, held in enumerate(self.slot_of):
            for expert, slot in held.items():
                assert slot.expert == ExpertId(layer, expert), f"the index says what slot {slot.index} holds"
                assert self._split is SlotSplit.GLOBAL or self._pool_of(slot) == layer, "slots keep to their layer"
        assert int(self._may_go_LE.sum()) <= len(self.slots), "only what is in a slot can be given up"

    def _least_worth(self, pool: int) -> ExpertId | None:
        """Of the pool's experts that may be given up; None when there are none.

        Sorted once for all that give way in an epoch of the scores: sorting takes longer than giving up. What may be
        given up only since then, or has become worth more since then, waits until the others have gone.
        """
        victims = self._victims.get(pool)
        if victims is not None and victims.epoch == self._score.epoch:
            victim = self._first_of(victims, pool)
            if victim is not None:
                return victim
        victims = self._victims[pool] = self._sort(pool)
        return self._first_of(victims, pool)

    def _first_of(self, victims: "_Victims", pool: int) -> ExpertId | None:
        """Forgets those that must stay."""
        first, width = (pool if self._split is SlotSplit.LAYER else 0), self.geometry.num_experts
        while victims.order:
            number, score = victims.order[-1]
            victim = ExpertId(first + number // width, number % width)
            if self._may_go_LE[victim] and self._score.of(victim) <= score:
                return victim
            victims.order.pop()
        return None

    def _sort(self, pool: int) -> "_Victims":
        """The few that are worth least; equal scores in the order of their experts."""
        layers = slice(pool, pool + 1) if self._split is SlotSplit.LAYER else slice(0, self.geometry.num_layers)
        may_go_N = self._may_go_LE[layers].ravel().nonzero()[0]
        scores_N = self._score(layers).ravel()[may_go_N]
        if len(scores_N) > 2 * FEW_VICTIMS:
            # All that are worth as much as the last of the few: which of them come first must not be chance.
            bound = np.partition(scores_N, FEW_VICTIMS - 1)[FEW_VICTIMS - 1]
            least = (scores_N <= bound).nonzero()[0]
            may_go_N, scores_N = may_go_N[least], scores_N[least]
        order = scores_N.argsort(kind="stable")[::-1]
        return _Victims(self._score.epoch, list(zip(may_go_N[order].tolist(), scores_N[order].tolist(), strict=True)))

    def _pool_of(self, slot: Slot) -> int:
        return slot.index // self.geometry.slots_per_layer if self._split is SlotSplit.LAYER else 0
