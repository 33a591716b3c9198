"""Feeds one layer's experts to compute in the policy's order: pins what is there, asks for what is not, lets go.

Part of the expert cache, on the engine thread: knows slots and loads, not hints.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from compute_node.acquisition import Acquisition
from compute_node.copy_ticket import CopyTicket
from compute_node.expert_history import ExpertHistory
from compute_node.loads import Load, LoadState, Transfers
from compute_node.prefetch import Prefetcher
from compute_node.schedule import SchedulePolicy
from compute_node.slots import Slot, SlotState, SlotTable
from promoe.errors import Unavailable
from promoe.ids import ExpertId


class ComputeMarks(Protocol):
    """The part of a device that the cache needs: when compute has finished."""

    def mark_compute(self) -> CopyTicket:
        """A ticket that is done when all compute issued so far has finished."""

    def synchronize(self) -> None:
        """Blocks until all work has finished."""


@dataclass(frozen=True)
class FeedParts:
    """What the feed shares with its cache; `arrive`, `stop`, `new_load` and `look_around` are the cache's own.

    Attributes:
        wait_begins: told when there is nothing to compute with until a load is ISSUED.
        look_around: once a layer, when compute has begun to wait and all that the layer lacks is on its way.
    """

    table: SlotTable
    history: ExpertHistory
    prefetcher: Prefetcher
    transfers: Transfers
    marks: ComputeMarks
    clock: Callable[[], float]
    lock: threading.Condition
    new_load: Callable[[ExpertId, Slot], Load]
    arrive: Callable[[Slot, Load], None]
    stop: Callable[[Sequence[Slot]], None]
    look_around: Callable[[], None]
    wait_begins: Callable[[], None]


class ExpertFeed:
    """One acquisition after the other."""

    def __init__(self, parts: FeedParts, policy: SchedulePolicy) -> None:
        self._parts = parts
        self._policy = policy
        self._is_eager = policy.early_preemption or policy.serial

    def open(self, layer: int, needed: Sequence[int]) -> Acquisition:
        """Pins what is there or under way; `demand` asks for the rest."""
        hits: list[int] = []
        late: list[Slot] = []
        absent: list[int] = []
        pinned: dict[int, Slot] = {}
        ready = self._parts.table.ready(layer)
        held = self._parts.table.slot_of[layer]
        for expert in needed:
            slot = held.get(expert)
            if slot is None:
                absent.append(expert)
                continue
            self._parts.prefetcher.needed(slot)
            self._parts.table.pin(slot)
            pinned[expert] = slot
            if slot.state is SlotState.READY:
                hits.append(expert)
            else:
                late.append(slot)
        late.sort(key=_when_expected)
        late_experts = tuple(slot.expert.expert for slot in late if slot.expert is not None)
        acquisition = Acquisition(
            layer, tuple(hits), (*late_experts, *absent), late=late_experts, ready=ready, pinned=pinned, waiting=absent
        )
        if self._is_eager:
            for slot in late:
                self._parts.prefetcher.urge(slot)
        return acquisition

    def demand(self, acquisition: Acquisition) -> None:
        """Asks for all that is missing and that there are slots for, where the policy does so at once."""
        if self._is_eager:
            self._demand_more(acquisition)
            # With all on its way, what has to be done anyway is done while compute waits.
            acquisition.may_look = not acquisition.waiting

    def arrivals(self, acquisition: Acquisition) -> Iterator[tuple[int, int]]:
        """Hands out (expert, slot index) as they can be computed, in the policy's order.

        The slot stays pinned until the next item is asked for. A layer that needs more experts than there are slots is
        streamed: what was computed gives way to what is missing.
        """
        waiting = acquisition.waiting
        if self._policy.serial:
            self._await_all(acquisition)
        needed = [*acquisition.hits, *acquisition.misses]
        remaining = needed if self._policy.reorder else sorted(needed)
        while remaining:
            expert = self._next_computable(acquisition, remaining)
            yield expert, acquisition.pinned[expert].index
            remaining.remove(expert)
            if waiting:
                self._release(acquisition, expert)
                if self._is_eager:
                    self._demand_more(acquisition)
                if self._policy.serial:
                    self._await_all(acquisition)

    def close(self, acquisition: Acquisition) -> None:
        """Ends the layer's pins; loads that nobody will compute with any more are stopped."""
        mark = self._parts.marks.mark_compute()
        prefetcher = self._parts.prefetcher
        with self._parts.lock:
            slots = list(acquisition.pinned.values())
            asked = [slot for slot in slots if slot.load is not None and not prefetcher.is_under_way(slot)]
            loads = [slot.load for slot in asked if slot.load is not None]
            if loads:
                prefetcher.stop(asked)
                self._parts.transfers.settle(loads)
            for slot in slots:
                slot.last_compute = mark
                if slot in asked:
                    slot.doomed = True
                self._unpin(slot)
            acquisition.pinned.clear()

    # ------------------------------------------------------------------ slots

    def _demand_more(self, acquisition: Acquisition) -> None:
        """Starts loading as many of those that wait for a slot as there are slots to be had."""
        waiting = acquisition.waiting
        while waiting and self._demand(acquisition, waiting[0]):
            waiting.pop(0)

    def _demand(self, acquisition: Acquisition, expert: int) -> bool:
        """False when every slot is in use."""
        layer = acquisition.layer
        with self._parts.lock:
            slot = self._take(layer)
            if slot is None:
                return False
            try:
                load = self._parts.new_load(ExpertId(layer, expert), slot)
            except Unavailable:
                self._parts.table.give_back(slot)
                raise
            self._parts.table.place(slot, load)
            self._parts.history.loaded(load.expert, is_needed=True)
            self._parts.table.pin(slot)
            acquisition.pinned[expert] = slot
            acquisition.loaded_nbytes += load.nbytes
            self._parts.transfers.submit([load])
        return True

    def _take(self, layer: int) -> Slot | None:
        """Where everything else is pinned, the prefetches that are wanted last give way."""
        slot = self._parts.table.take(layer)
        while slot is None:
            victim = self._parts.prefetcher.least_wanted(layer)
            if victim is None:
                return None
            self._parts.stop([victim])
            if self._parts.prefetcher.is_under_way(victim):
                self._give_up_finished(victim)
            slot = self._parts.table.take(layer)
        return slot

    def _give_up_finished(self, slot: Slot) -> None:
        """A load that came to its end before it could be stopped; what is copied into the slot later waits for it."""
        assert slot.load is not None, "a LOADING slot has a load"
        self._parts.prefetcher.unwatch(slot)
        if slot.load.state is LoadState.FAILED:
            self._parts.table.forget(slot)
        else:
            self._parts.arrive(slot, slot.load)

    def _release(self, acquisition: Acquisition, expert: int) -> None:
        slot = acquisition.pinned.pop(expert)
        slot.last_compute = self._parts.marks.mark_compute()
        with self._parts.lock:
            self._unpin(slot)

    def _unpin(self, slot: Slot) -> None:
        self._parts.table.unpin(slot)
        if slot.pins == 0:
            self._parts.lock.notify_all()

    # ------------------------------------------------------------------ order and waiting

    def _next_computable(self, acquisition: Acquisition, remaining: list[int]) -> int:
        """Blocks until one of `remaining` can be computed, the one that the policy wants, and returns it."""
        pinned = acquisition.pinned
        if self._policy.reorder:
            under_way: list[Slot] = []
            for expert in remaining:
                slot = pinned.get(expert)
                if slot is not None and slot.state is SlotState.READY:
                    return expert
                if slot is not None and self._policy.early_preemption:
                    under_way.append(slot)
            if under_way:
                return self._await(acquisition, under_way)
        expert = remaining[0]
        if expert not in pinned:
            if self._demand(acquisition, expert):
                acquisition.waiting.remove(expert)
            else:
                # All slots hold experts that are still to be computed: one of those goes first.
                expert = next(expert for expert in remaining if expert in pinned)
        slot = pinned[expert]
        return expert if slot.state is SlotState.READY else self._await(acquisition, [slot])

    def _await(self, acquisition: Acquisition, slots: Sequence[Slot]) -> int:
        """Blocks until the first of these LOADING slots is READY; returns its expert."""
        loads: list[Load] = []
        for slot in slots:
            assert slot.load is not None, "a LOADING slot has a load"
            if slot.kept_nbytes is not None or self._parts.prefetcher.is_under_way(slot):
                self._parts.prefetcher.urge(slot)
            loads.append(slot.load)
        self._parts.wait_begins()
        started_s = self._parts.clock()
        if acquisition.may_look:
            acquisition.may_look = False
            self._parts.look_around()
        load = self._parts.transfers.next_issued(loads)
        load.ticket.wait_on_compute()
        expert = load.expert.expert
        stall_s = self._parts.clock() - started_s
        acquisition.stall_s += stall_s
        if expert in acquisition.late:
            acquisition.late_stall_s += stall_s
        with self._parts.lock:
            self._parts.arrive(acquisition.pinned[expert], load)
        return expert

    def _await_all(self, acquisition: Acquisition) -> None:
        while under_way := [slot for slot in acquisition.pinned.values() if slot.state is SlotState.LOADING]:
            self._await(acquisition, under_way)


def _when_expected(slot: Slot) -> tuple[bool, float]:
    """In flight in its order, then partly copied, the most complete first (ProMoE §5)."""
    if slot.kept_nbytes is not None:
        return True, -slot.kept_nbytes
    return False, slot.load.rank if slot.load is not None else 0.0
