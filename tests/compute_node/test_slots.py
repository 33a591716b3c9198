"""The slots' states and their two pools."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from librt.vecs import vec
from mypy_extensions import i64

from compute_node.device.cpu import DONE
from compute_node.loads import Load
from compute_node.schedule import SlotSplit
from compute_node.slots import CacheGeometry, Slot, SlotState, SlotTable
from promoe.ids import ExpertId

NUM_LAYERS, NUM_EXPERTS, SLOTS_PER_LAYER = 3, 6, 2


class Says:
    """What a test says experts are worth, and that it changed: `worth_LE`, and `of_layers` on top of it."""

    def __init__(self, worth_LE: npt.NDArray[np.float64]) -> None:
        self.worth_LE = worth_LE
        self.of_layers = [0.0] * len(worth_LE)
        self.changes: vec[i64] = vec[i64]([0] * len(worth_LE))

    def within(self, layer: int) -> vec[float]:
        return vec[float](self.worth_LE[layer].tolist())

    def of_layer(self, layer: int) -> float:
        return self.of_layers[layer]

    def set(self, layer: int, number: int, worth: float) -> None:
        self.worth_LE[layer, number] = worth
        self.changes[layer] += 1


class Scored:
    """A table whose experts are worth what a test says."""

    def __init__(self, split: SlotSplit) -> None:
        self.worth = Says(np.arange(float(NUM_LAYERS * NUM_EXPERTS)).reshape(NUM_LAYERS, NUM_EXPERTS))
        geometry = CacheGeometry(NUM_LAYERS, NUM_EXPERTS, SLOTS_PER_LAYER, blob_nbytes=100, experts_per_token=1)
        addresses = [1000 * index for index in range(geometry.num_slots)]
        self.table = SlotTable(addresses, geometry, split, self.worth, DONE)

    def load(
        self, layer: int, expert: int, arrives: bool = True, may_go: Callable[[ExpertId], bool] | None = None
    ) -> Slot | None:
        slot = self.table.take(layer, may_go)
        if slot is not None:
            self.table.place(slot, Load(ExpertId(layer, expert), 0, slot.address, 100, DONE, DONE))
            if arrives:
                self.table.arrived(slot)
        self.table.check_integrity()
        return slot


@pytest.mark.parametrize("split", SlotSplit)
def test_the_least_worth_gives_way(split: SlotSplit) -> None:
    scored = Scored(split)
    for layer in range(NUM_LAYERS):
        for expert in (4, 5):
            assert scored.load(layer, expert) is not None
    slot = scored.load(2, 0)
    assert slot is not None
    gone = [(layer, e) for layer in range(NUM_LAYERS) for e in (4, 5) if scored.table.find(ExpertId(layer, e)) is None]
    assert gone == ([(2, 4)] if split is SlotSplit.LAYER else [(0, 4)]), "of its own layer, or of all"
    assert sum(scored.table.evictions.values()) == 1


def test_the_least_worth_is_asked_for_and_may_stay() -> None:
    scored = Scored(SlotSplit.LAYER)
    scored.load(1, 2)
    scored.load(1, 3)
    asked: list[ExpertId] = []

    def may_go(victim: ExpertId) -> bool:
        asked.append(victim)
        return len(asked) > 1

    assert scored.load(1, 4, may_go=may_go) is None
    assert scored.load(1, 4, may_go=may_go) is not None
    assert asked == [ExpertId(1, 2), ExpertId(1, 2)]


@pytest.mark.parametrize("split", SlotSplit)
def test_what_is_pinned_or_under_way_never_gives_way(split: SlotSplit) -> None:
    scored = Scored(split)
    pinned = [slot for layer in range(NUM_LAYERS) if (slot := scored.load(layer, 0)) is not None]
    for slot in pinned:
        scored.table.pin(slot)
    for layer in range(NUM_LAYERS):
        scored.load(layer, 1, arrives=False)
    assert all(scored.table.take(layer) is None for layer in range(NUM_LAYERS))
    scored.table.unpin(pinned[1])
    assert scored.table.take(1) is pinned[1]


def test_half_a_load_gives_way_only_when_it_is_paused() -> None:
    scored = Scored(SlotSplit.LAYER)
    scored.load(0, 5)
    slot = scored.load(0, 0, arrives=False)
    assert slot is not None
    assert scored.load(0, 1) is not None, "the READY one went"
    assert scored.table.find(ExpertId(0, 5)) is None
    slot.kept_nbytes = 40
    scored.table.update(slot)
    scored.worth.set(0, 0, -1.0)
    assert scored.load(0, 2) is slot, "now the half one goes"
    assert slot.kept_nbytes is None


def test_a_doomed_slot_goes_with_its_last_pin() -> None:
    scored = Scored(SlotSplit.GLOBAL)
    slot = scored.load(1, 1)
    assert slot is not None
    scored.table.pin(slot)
    scored.table.pin(slot)
    slot.doomed = True
    scored.table.unpin(slot)
    assert scored.table.find(ExpertId(1, 1)) is slot
    scored.table.unpin(slot)
    assert scored.table.find(ExpertId(1, 1)) is None
    assert slot.state is SlotState.FREE
    scored.table.check_integrity()


def test_who_watches_is_told_before_an_expert_goes() -> None:
    scored = Scored(SlotSplit.LAYER)
    told: list[ExpertId | None] = []
    scored.table.on_given_up = lambda slot: told.append(slot.expert)
    for expert in (3, 4, 5):
        scored.load(0, expert)
    assert told == [ExpertId(0, 3)]


def test_a_slot_that_was_taken_in_vain_is_free_again() -> None:
    scored = Scored(SlotSplit.GLOBAL)
    slot = scored.table.take(0)
    assert slot is not None
    scored.table.give_back(slot)
    scored.table.check_integrity()
    assert scored.table.take(0) is slot


def test_states_are_told_by_expert() -> None:
    scored = Scored(SlotSplit.GLOBAL)
    scored.load(0, 1)
    scored.load(2, 3, arrives=False)
    states = scored.table.states_LE()
    assert states[0, 1] == 1
    assert states[2, 3] == 2
    assert states.sum() == 3


def test_a_table_is_filled_as_it_was() -> None:
    scored = Scored(SlotSplit.LAYER)
    resident = [0, 1, 6, -1, 12, 17]
    scored.table.fill(resident)
    scored.table.check_integrity()
    assert scored.table.find(ExpertId(2, 5)) is scored.table.slots[5]
    assert scored.table.take(1) is scored.table.slots[3], "the one that holds nothing"


def test_integrity_is_checked_for_real() -> None:
    scored = Scored(SlotSplit.LAYER)
    slot = scored.load(0, 1)
    assert slot is not None
    slot.expert = ExpertId(0, 2)
    with pytest.raises(AssertionError, match="the index finds"):
        scored.table.check_integrity()


actions = st.lists(
    st.tuples(
        st.sampled_from(["load", "arrive", "pin", "unpin", "pause", "forget"]),
        st.integers(0, NUM_LAYERS - 1),
        st.integers(0, NUM_EXPERTS - 1),
    ),
    max_size=60,
)


@given(actions=actions, split=st.sampled_from(SlotSplit))
def test_whatever_happens_the_table_stays_whole(actions: list[tuple[str, int, int]], split: SlotSplit) -> None:
    scored = Scored(split)
    table = scored.table
    for action, layer, expert in actions:
        slot = table.find(ExpertId(layer, expert))
        if action == "load" and slot is None:
            scored.load(layer, expert, arrives=False)
        elif slot is not None:
            if action == "arrive" and slot.state is SlotState.LOADING:
                table.arrived(slot)
            elif action == "pin":
                table.pin(slot)
            elif action == "unpin" and slot.pins:
                table.unpin(slot)
            elif action == "pause" and slot.state is SlotState.LOADING:
                slot.kept_nbytes = expert
                table.update(slot)
            elif action == "forget" and not slot.pins:
                table.forget(slot)
        table.check_integrity()
        assert len(table.held(layer)) <= len(table.slots)


def idle_experts(table: SlotTable) -> set[ExpertId]:
    held = [slot for layer in range(NUM_LAYERS) for slot in table.held(layer)]
    return {s.expert for s in held if s.expert is not None and s.state is SlotState.READY and not s.pins}


def test_what_has_become_worth_more_stays() -> None:
    scored = Scored(SlotSplit.LAYER)
    scored.load(1, 2)
    scored.load(1, 3)
    assert scored.load(1, 4, may_go=lambda victim: False) is None
    scored.worth.set(1, 2, 99.0)
    scored.load(1, 4)
    assert scored.table.find(ExpertId(1, 2)) is not None
    assert scored.table.find(ExpertId(1, 3)) is None


operations = st.lists(
    st.tuples(
        st.sampled_from(["load", "load", "load", "arrive", "pin", "unpin", "forget", "worth"]),
        st.integers(0, NUM_LAYERS - 1),
        st.integers(0, NUM_EXPERTS - 1),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(st.sampled_from(SlotSplit), operations)
def test_whatever_happened_the_least_worth_of_what_may_go_gives_way(
    split: SlotSplit, steps: list[tuple[str, int, int, int]]
) -> None:
    scored = Scored(split)
    table, asked = scored.table, list[ExpertId]()

    def may_go(victim: ExpertId) -> bool:
        asked.append(victim)
        return True

    for what, layer, number, worth in steps:
        expert = ExpertId(layer, number)
        slot = table.find(expert)
        if what == "worth":
            scored.worth.set(layer, number, worth)
        elif what == "load" and slot is None:
            idle = {e for e in idle_experts(table) if split is SlotSplit.GLOBAL or e.layer == layer}
            asked.clear()
            loaded = scored.load(layer, number, arrives=False, may_go=may_go)
            if asked:
                assert asked == [min(idle, key=lambda other: (scored.worth.worth_LE[other], other))]
            assert loaded is not None or not idle, "whatever may go is found"
        elif slot is not None and what == "arrive" and slot.state is SlotState.LOADING:
            table.arrived(slot)
        elif slot is not None and what == "pin":
            table.pin(slot)
        elif slot is not None and what == "unpin" and slot.pins:
            table.unpin(slot)
        elif slot is not None and what == "forget" and not slot.pins:
            table.forget(slot)
        table.check_integrity()


def gone_in_order(worth: Says, num: int) -> list[ExpertId]:
    """Of a table that is full and one pool, what gives way one after the other."""
    num_layers, num_experts = worth.worth_LE.shape
    geometry = CacheGeometry(num_layers, num_experts, num_experts, blob_nbytes=100, experts_per_token=1)
    table = SlotTable(range(geometry.num_slots), geometry, SlotSplit.GLOBAL, worth, DONE)
    table.fill(list(range(geometry.num_slots)))
    gone: list[ExpertId] = []

    def note(victim: ExpertId) -> bool:
        gone.append(victim)
        return True

    for _ in range(num):
        slot = table.take(0, note)
        assert slot is not None
        # Not READY again, so that the next take gives up another.
        table.place(slot, Load(gone[-1], 0, slot.address, 100, DONE, DONE))
        table.check_integrity()
    return gone


@given(
    worth=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4),
    of_layers=st.lists(st.integers(-3, 3), min_size=4, max_size=4),
)
def test_in_one_pool_the_least_worth_of_all_layers_goes_first_and_equals_by_number(
    worth: list[list[int]], of_layers: list[int]
) -> None:
    says = Says(np.array(worth, np.float64))
    says.of_layers = [float(more) for more in of_layers]
    everything = [ExpertId(layer, expert) for layer in range(len(worth)) for expert in range(5)]
    in_order = sorted(
        everything, key=lambda expert: (worth[expert.layer][expert.expert] + of_layers[expert.layer], expert)
    )
    assert gone_in_order(says, len(everything)) == in_order


def test_what_becomes_worth_less_goes_at_once() -> None:
    scored = Scored(SlotSplit.GLOBAL)
    for layer in range(NUM_LAYERS):
        for expert in (4, 5):
            scored.load(layer, expert)
    scored.worth.set(2, 5, -1.0)
    assert scored.load(0, 0) is not None
    assert scored.table.find(ExpertId(2, 5)) is None
    scored.worth.of_layers[1] = -100.0
    assert scored.load(0, 1) is not None
    assert scored.table.find(ExpertId(1, 4)) is None
