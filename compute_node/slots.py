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
from librt.vecs import vec
from mypy_extensions import i64

from compute_node.copy_ticket import CopyTicket
from compute_node.loads import Load
from compute_node.schedule import SlotSplit
from promoe.ids import ExpertId

_NONE: Final = -1
_NEVER: Final = -1


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


class Worth(Protocol):
    """What experts are worth: what `within` says of one beside others of its layer, and what `of_layer` adds."""

    @property
    def changes(self) -> vec[i64]:
        """By layer: counts up whenever what `within` says of it may have changed; one and the same vec always."""

    def within(self, layer: int) -> vec[float]:
        """Of the layer's experts, (E,)."""

    def of_layer(self, layer: int) -> float:
        """Of all of them alike; may change always."""


class SlotTable:
    """All slots of a cache.

    Args:
        addresses: of the slots, on the device.
        geometry: the cache's sizes.
        split: whether a layer may use another's slots.
        worth: of experts: what is worth least is given up first.
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
        worth: Worth,
        idle: CopyTicket,
    ) -> None:
        assert len(addresses) == geometry.num_slots, "every layer has its slots"
        self.geometry = geometry
        self.slots = [Slot(index, address, idle) for index, address in enumerate(addresses)]
        self._split = split
        self._worth = worth
        num_pools = geometry.num_layers if split is SlotSplit.LAYER else 1
        share = len(self.slots) // num_pools
        self._free = [self.slots[pool * share : (pool + 1) * share][::-1] for pool in range(num_pools)]
        self.slot_of: list[dict[int, Slot]] = [{} for _ in range(geometry.num_layers)]
        self._may_go: vec[bool] = vec[bool]([False] * (geometry.num_layers * geometry.num_experts))
        # By layer: which of those that may go is worth least, and at which of the layer's changes that was looked up.
        self._least: vec[i64] = vec[i64]([_NONE] * geometry.num_layers)
        self._least_worth: vec[float] = vec[float]([0.0] * geometry.num_layers)
        self._looked_up: vec[i64] = vec[i64]([_NEVER] * geometry.num_layers)
        self._changes: vec[i64] = worth.changes
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
        victim = self._victim(pool)
        if victim is None or (may_go is not None and not may_go(victim)):
            return None
        slot = self.slot_of[victim.layer][victim.expert]
        self.forget(slot)
        self.evictions[victim.layer] += 1
        return self._free[pool].pop()

    def has_victim(self, pool: int) -> bool:
        """Whether something could be given up for what it is worth."""
        return self._victim(pool) is not None

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
        self._let_go(slot.expert, False)
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
        self._let_go(slot.expert, False)

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
        self._let_go(slot.expert, is_still and slot.pins == 0)

    def states_LE(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """By layer and expert: 1 resident, 2 loading, 0 neither."""
        states_LE = np.zeros((self.geometry.num_layers, self.geometry.num_experts), np.uint8)
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
                may_go = self._may_go[self._place_of(slot.expert)]
                assert not (may_go and slot.pins), f"slot {slot.index} is pinned and cannot be given up"
                assert may_go or slot.pins or slot.state is SlotState.LOADING, f"slot {slot.index} can be given up"
        for layer, held in enumerate(self.slot_of):
            for expert, slot in held.items():
                assert slot.expert == ExpertId(layer, expert), f"the index says what slot {slot.index} holds"
                assert self._split is SlotSplit.GLOBAL or self._pool_of(slot) == layer, "slots keep to their layer"
        assert sum(self._may_go) <= len(self.slots), "only what is in a slot can be given up"
        for layer in range(self.geometry.num_layers):
            self._assert_least(layer)

    def _victim(self, pool: int) -> ExpertId | None:
        """Of the pool's experts that may be given up the one worth least, the first of equals; None: there are none."""
        if self._split is SlotSplit.LAYER:
            self._look_up(pool)
            return None if self._least[pool] == _NONE else ExpertId(pool, self._least[pool])
        victim = _NONE
        least = 0.0
        for layer in range(self.geometry.num_layers):
            self._look_up(layer)
            if self._least[layer] == _NONE:
                continue
            worth = self._least_worth[layer] + self._worth.of_layer(layer)
            if victim == _NONE or worth < least:
                victim, least = layer, worth
        return None if victim == _NONE else ExpertId(victim, self._least[victim])

    def _look_up(self, layer: int) -> None:
        """Which of the layer's experts is worth least, unless that is known and nothing has changed."""
        if self._looked_up[layer] == self._changes[layer]:
            return
        self._least[layer], self._least_worth[layer] = self._search(layer)
        self._looked_up[layer] = self._changes[layer]

    def _search(self, layer: int) -> tuple[int, float]:
        """Of the layer's experts that may be given up the one worth least, or `_NONE`, and what it is worth."""
        worth_E, may_go = self._worth.within(layer), self._may_go
        least: i64 = _NONE
        place: i64 = layer * self.geometry.num_experts
        for expert in range(len(worth_E)):
            if may_go[place] and (least == _NONE or worth_E[expert] < worth_E[least]):
                least = expert
            place += 1
        return least, 0.0 if least == _NONE else worth_E[least]

    def _let_go(self, expert: ExpertId, may_go: bool) -> None:
        """Notes whether the expert may be given up."""
        place = self._place_of(expert)
        if self._may_go[place] is not may_go:
            self._may_go[place] = may_go
            # Something less worth came, or what was worth least must stay.
            if may_go or self._least[expert.layer] == expert.expert:
                self._looked_up[expert.layer] = _NEVER

    def _place_of(self, expert: ExpertId) -> int:
        return expert.layer * self.geometry.num_experts + expert.expert

    def _assert_least(self, layer: int) -> None:
        """What was looked up is still so."""
        if self._looked_up[layer] == self._changes[layer]:
            known = (self._least[layer], self._least_worth[layer])
            assert self._search(layer) == known, f"layer {layer} knows which of its experts is worth least"

    def _pool_of(self, slot: Slot) -> int:
        return slot.index // self.geometry.slots_per_layer if self._split is SlotSplit.LAYER else 0
