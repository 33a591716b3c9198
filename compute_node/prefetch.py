"""Loads experts before they are needed: which, in what order, and how many the link can still carry.

Owned by the engine thread; the expert cache calls it whenever it looks around. Only a shallow queue is handed to the
link, what it carries until the next look, so that better knowledge can still change the order; but in a prefill, of
which nothing better will be known, the next layer whole.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from compute_node.expert_history import ExpertHistory
from compute_node.hint_book import HintBook
from compute_node.loads import Load, LoadState, Transfers
from compute_node.pace import Pace
from compute_node.prefetch_counters import PrefetchCounters
from compute_node.prefetch_worth import PrefetchWorth
from compute_node.schedule import HintUse, SchedulePolicy
from compute_node.slots import Slot, SlotState, SlotTable
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason

HORIZON_LAYERS: Final = 8
"""Hints for visits further away only protect slots."""

STREAM_LAYERS: Final = 2
"""How many layers of a prefill are loaded ahead."""

LEAST_PROBABILITY: Final = 0.15
"""Less likely experts are not prefetched, however idle the link is: a chunk of theirs may hold up a demand load."""

LOAD_COST: Final = 0.25
RELOAD_COST: Final = 2.0
"""Of a wrong prefetch, in units of the wait that a right one saves; chosen by replaying chats of the demo model. The
first is not forgiven where the link is idle: a load takes time from the engine thread, too."""

LEAST_STREAMED_PROBABILITY: Final = 0.5
FEWEST_QUEUED_BLOBS: Final = 2

MOST_STREAMED_SHARE: Final = 0.25
"""Of all slots: a prefill's next layer is queued whole, as far as that takes no more."""


class Candidate(NamedTuple):
    """An expert that may be loaded for a coming visit. The smallest rank is loaded first."""

    expert: ExpertId
    probability: float
    rank: float
    reason: LoadReason


class Prefetcher:
    """Turns hints into loads.

    Args:
        policy: whether, and how.
        table: the slots.
        history: how likely experts are needed, hints included.
        transfers: moves the loads.
        new_load: makes a load of an expert into a slot; raises Unavailable when its blob is withdrawn.
    """

    def __init__(
        self,
        policy: SchedulePolicy,
        table: SlotTable,
        history: ExpertHistory,
        transfers: Transfers,
        new_load: Callable[[ExpertId, Slot], Load],
    ) -> None:
        self._policy = policy
        self._table = table
        self._history = history
        self._transfers = transfers
        self._new_load = new_load
        self._blob_nbytes = table.geometry.blob_nbytes
        # Only estimates of the next use can be compared between what comes and what goes.
        self._weighs_victims = policy.eviction == "next_use"
        self.book = HintBook(table.geometry.num_layers)
        self.pace = Pace()
        self.worth = PrefetchWorth(table.geometry.num_layers)
        self.counters = PrefetchCounters()
        self.is_prefill = False
        self.link_bytes_per_s = 0.0
        self._loading: dict[ExpertId, Slot] = {}
        self._exhausted_version = -1
        self._lacked_slots = False
        self._withdrawn: set[ExpertId] = set()
        table.on_given_up = self.given_up

    @property
    def num_loading(self) -> int:
        """Loads that nobody waits for."""
        return len(self._loading)

    def arrivals(self) -> Iterator[Slot]:
        """Slots whose load has come to an end since the last look; the caller settles their states."""
        if not self._loading:
            return
        for expert, slot in list(self._loading.items()):
            load = slot.load
            assert load is not None, "a slot is LOADING as long as its load is watched"
            if load.has_arrived or load.state is LoadState.FAILED:
                del self._loading[expert]
                yield slot

    def needed(self, slot: Slot) -> None:
        """A slot's expert is routed: if it was loaded ahead, that has paid."""
        if not slot.is_speculative or slot.expert is None:
            return
        slot.is_speculative = False
        is_late = slot.state is SlotState.LOADING
        if slot.is_streamed:
            return
        self.worth.gained(slot.expert.layer, is_late)
        if is_late:
            self.counters.late_nbytes += self._blob_nbytes
        else:
            self.counters.useful_nbytes += self._blob_nbytes

    def urge(self, slot: Slot) -> None:
        """Compute waits for a slot that is LOADING: its load becomes a demand load, or goes on as one."""
        assert slot.expert is not None, "a LOADING slot has an expert"
        assert slot.load is not None, "a LOADING slot has a load"
        self._loading.pop(slot.expert, None)
        if slot.kept_nbytes is None:
            self._transfers.promote(slot.load)
        else:
            slot.kept_nbytes = None
            slot.load.reason = LoadReason.DEMAND
            self._transfers.submit([slot.load])

    def unwatch(self, slot: Slot) -> None:
        """Its load will not be waited for."""
        if slot.expert is not None:
            self._loading.pop(slot.expert, None)

    def is_under_way(self, slot: Slot) -> bool:
        """Its load is on the link or in its queue, and nobody waits for it."""
        return slot.expert in self._loading

    def unneeded(self, layer: int) -> list[Slot]:
        """The layer's routing is known and what it needs is pinned: the rest of its prefetches (ProMoE §5)."""
        return [slot for expert, slot in self._loading.items() if expert.layer == layer and slot.pins == 0]

    def stop(self, slots: Sequence[Slot]) -> list[Slot]:
        """Takes loads off the link's queue; returns the slots that keep what has come, and can be given up."""
        self._transfers.pause([slot.load for slot in slots if slot.load is not None])
        kept: list[Slot] = []
        for slot in slots:
            assert slot.load is not None, "a LOADING slot has a load"
            assert slot.expert is not None, "a LOADING slot has an expert"
            # Read once: a chunk under way may still end, and what is decided must not depend on when.
            state, copied_nbytes = slot.load.state, slot.load.copied_nbytes
            if state in (LoadState.ISSUED, LoadState.FAILED):
                continue
            self._loading.pop(slot.expert, None)
            slot.kept_nbytes = copied_nbytes
            if copied_nbytes or slot.pins:
                self._table.update(slot)
                kept.append(slot)
            else:
                self._table.forget(slot)
        return kept

    def given_up(self, slot: Slot) -> None:
        """The slot loses its expert."""
        if not slot.is_speculative or slot.expert is None:
            return
        moved_nbytes = self._blob_nbytes if slot.kept_nbytes is None else slot.kept_nbytes
        if not slot.is_streamed:
            self.counters.wasted_nbytes += moved_nbytes
            self.worth.wasted(slot.expert.layer, moved_nbytes / self._blob_nbytes, self.pace.link_busy_share)

    def least_wanted(self, layer: int) -> Slot | None:
        """The prefetch under way whose expert is needed last, of those whose slot this layer may use."""
        mine = [slot for slot in self._loading.values() if slot.pins == 0 and self._table.may_use(layer, slot)]
        return max(mine, key=lambda slot: slot.load.rank if slot.load is not None else 0.0, default=None)

    def start_over(self) -> None:
        """Forgets hints and measurements, and gives up all loads: between steps, nobody waits for any."""
        loading = [slot for slot in self._table.slots if slot.load is not None]
        self._transfers.pause([slot.load for slot in loading if slot.load is not None])
        for slot in loading:
            self._table.forget(slot)
        for slot in self._table.slots:
            slot.is_speculative = False
        self._loading.clear()
        self.book = HintBook(self._table.geometry.num_layers)
        self.pace = Pace()
        self.worth = PrefetchWorth(self._table.geometry.num_layers)
        self._exhausted_version = -1

    def begin_step(self, is_prefill: bool) -> None:
        """What does not change within a step is looked up once, so that a trace can say it."""
        self.pace.begin_step(changes_phase=is_prefill != self.is_prefill)
        self.is_prefill = is_prefill
        self.link_bytes_per_s = self._transfers.link_bytes_per_s() or 0.0

    def released(self) -> None:
        """A layer's slots may be given up again, for what nothing could be given up for while they were pinned."""
        if self._lacked_slots:
            self._exhausted_version, self._lacked_slots = -1, False

    def top_up(self) -> None:
        """Hands the link what it can carry until the next look; in a prefill, what its next layer lacks."""
        # Not what the link says is queued: that depends on how far it happens to be with the chunk under way.
        queued_nbytes = len(self._loading) * self._blob_nbytes
        self.pace.looked_at_link(queued_nbytes > 0)
        full_nbytes = self._room_nbytes()
        room_nbytes = full_nbytes - queued_nbytes
        if 2 * room_nbytes < full_nbytes:
            # Several at a time: every look at the candidates takes time from compute.
            return
        if self._exhausted_version == self._history.version:
            # Since the last look, which found nothing more to load, nothing was learned.
            return
        # The slot that is worth least is not worth it for a likelier expert, so it is not for this one. A victim that
        # has gone makes way for one that is worth more.
        refused: dict[int, float] = {}
        started: list[Load] = []
        for candidate in self._candidates():
            pool = self._table.pool_of(candidate.expert.layer)
            if candidate.probability <= refused.get(pool, -1.0):
                continue
            load = self._start(candidate)
            if load is not None:
                started.append(load)
                room_nbytes -= self._blob_nbytes
                if room_nbytes <= 0:
                    break
            elif self._table.find(candidate.expert) is None and candidate.expert not in self._withdrawn:
                refused[pool] = candidate.probability
                self._lacked_slots = self._lacked_slots or not self._table.has_victim(pool)
        else:
            self._exhausted_version = self._history.version
        if started:
            self._transfers.submit(started)

    def _room_nbytes(self) -> float:
        until_next_look_nbytes = self.link_bytes_per_s * (self.pace.layer_s or 0.0)
        fewest = FEWEST_QUEUED_BLOBS
        if self.is_prefill:
            fewest = max(fewest, self._num_streamed_whole())
        return max(fewest * self._blob_nbytes, until_next_look_nbytes + self._blob_nbytes)

    def _num_streamed_whole(self) -> int:
        """What the next layer of a prefill lacks: nothing better will be known of it, and its turn is sure to come."""
        geometry, layer = self._table.geometry, self._history.layer + 1
        if layer >= geometry.num_layers:
            return 0
        held = self._table.slot_of[layer]
        num_lacking = 0
        for expert, probability in enumerate(self._history.next_probabilities_of(layer)):
            slot = held.get(expert)
            num_lacking += probability >= LEAST_STREAMED_PROBABILITY and (
                slot is None or slot.state is not SlotState.READY
            )
        return min(num_lacking, int(geometry.num_slots * MOST_STREAMED_SHARE))

    def _candidates(self) -> Iterator[Candidate]:
        """In the order they should be loaded."""
        if self.is_prefill:
            if self._policy.stream_prefill:
                yield from self._next_layers()
        elif self._policy.hints is HintUse.TOP:
            yield from self._heads()
        elif self._policy.hints is HintUse.BUDGETED:
            yield from self._affordable()

    def _next_layers(self) -> Iterator[Candidate]:
        """What the next layers of a prefill will need: nearly everything, likeliest first."""
        history = self._history
        for distance in range(1, STREAM_LAYERS + 1):
            layer = history.layer + distance
            if layer >= history.num_layers:
                return
            probability_E = history.next_probabilities_of(layer)
            for expert in sorted(range(len(probability_E)), key=lambda expert: -probability_E[expert]):
                probability = probability_E[expert]
                if probability < LEAST_STREAMED_PROBABILITY:
                    break
                yield Candidate(ExpertId(layer, expert), probability, float(distance), LoadReason.STREAM)

    def _heads(self) -> Iterator[Candidate]:
        """The heads of the hints, layer by layer."""
        for visit in self.book.coming(HORIZON_LAYERS):
            num = min(visit.num_expected, self._table.geometry.slots_per_layer)
            for place, expert in enumerate(visit.experts[:num]):
                rank = self._rank(visit.distance, place / self._history.num_experts)
                yield Candidate(ExpertId(visit.layer, expert), visit.scores[place], rank, LoadReason.PREFETCH)

    def _affordable(self) -> Iterator[Candidate]:
        """The likeliest experts that the link can carry in time: jobs of one size with deadlines and profits.

        Taken by probability; one is left out when, with it, more would have to be carried before some visit than can.
        """
        wanted = self._likely()
        if not wanted:
            return
        per_layer = self.link_bytes_per_s * (self.pace.layer_s or 0.0) / self._blob_nbytes
        # A chunk is worth moving even if the rest is late: never less than one expert before each visit.
        room = [max(1, int(until * per_layer)) for until in range(HORIZON_LAYERS + 1)]
        chosen: list[tuple[float, ExpertId, float]] = []
        for minus_score, distance, expert in wanted:
            if min(room[distance:]) >= 1:
                for until in range(distance, HORIZON_LAYERS + 1):
                    room[until] -= 1
                chosen.append((self._rank(distance, 1 + minus_score), expert, -minus_score))
        chosen.sort()
        for rank, expert, probability in chosen:
            yield Candidate(expert, probability, rank, LoadReason.PREFETCH)

    def _likely(self) -> list[tuple[float, int, ExpertId]]:
        """(- probability, distance, expert) of what is hinted and not there, likeliest first."""
        likely: list[tuple[float, int, ExpertId]] = []
        for visit in self.book.coming(HORIZON_LAYERS):
            if not self.worth.is_on(visit.layer):
                continue
            held = self._table.slot_of[visit.layer]
            for expert, score in zip(visit.experts, visit.scores, strict=True):
                if score < LEAST_PROBABILITY:
                    break
                slot = held.get(expert)
                if slot is None or slot.kept_nbytes is not None:
                    likely.append((-score, visit.distance, ExpertId(visit.layer, expert)))
        likely.sort()
        return likely

    def _rank(self, distance: int, fraction: float) -> float:
        """Visits in the order they will happen; within one by `fraction`, from 0 to 1."""
        return self.book.step * self._history.num_layers + self.book.layer + distance + 0.999 * fraction

    def _start(self, candidate: Candidate) -> Load | None:
        """A load to be submitted; None when the expert is there already, or no slot is worth less."""
        expert = candidate.expert
        slot = self._table.find(expert)
        if slot is None:
            slot = self._table.take(expert.layer, self._is_worth(candidate))
            if slot is None:
                return None
            try:
                load = self._new_load(expert, slot)
            except Unavailable:
                self._table.give_back(slot)
                self._withdrawn.add(expert)
                return None
            self._withdrawn.discard(expert)
            self._table.place(slot, load)
            self._history.loaded(expert, is_needed=False)
        elif slot.kept_nbytes is None or slot.pins:
            return None
        assert slot.load is not None, "a LOADING slot has a load"
        slot.load.reason, slot.load.rank = candidate.reason, candidate.rank
        slot.is_speculative, slot.is_streamed = True, candidate.reason is LoadReason.STREAM
        if slot.is_streamed:
            self.counters.streamed_nbytes += self._blob_nbytes - (slot.kept_nbytes or 0)
        slot.kept_nbytes = None
        self._loading[expert] = slot
        self._table.update(slot)
        return slot.load

    def _is_worth(self, candidate: Candidate) -> Callable[[ExpertId], bool] | None:
        """Whether a load now is worth the expert that has to go; None: always.

        If the guess is right, a wait is saved, and the same expert would have gone anyway. If it is wrong, the load was
        in vain, and the expert that went may have to come back.
        """
        if not self._weighs_victims:
            return None
        chance = candidate.probability

        def is_worth(victim: ExpertId) -> bool:
            return_chance = self._history.next_probability_of(victim)
            return (1 - chance) * (LOAD_COST + RELOAD_COST * return_chance) < chance

        return is_worth
