"""The expert cache against a plain simulation of itself, and in the corners: eviction, retirement, failure."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.device.cpu import CpuDevice
from compute_node.eviction import EVICTIONS, eviction_named
from compute_node.expert_cache import LayerOccupancy
from promoe.errors import Unavailable
from promoe.hint import IdArray
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout
from tests.compute_node.expert_stack import ExpertStack, PlainArena, StackOptions, open_stack

NUM_LAYERS, NUM_EXPERTS = 2, 6
LAYOUT = ExpertLayout.of(Dtype.FLOAT32, {"gate_up_proj": (6, 5), "down_proj": (5, 3)})
DEADLINE_S = 30.0


def numbered_arena() -> PlainArena:
    """Every expert's parameters are its own number."""
    arena = PlainArena(LAYOUT, NUM_LAYERS, NUM_EXPERTS)
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            number = float(layer * NUM_EXPERTS + expert + 1)
            tensors = {part.name: torch.full(part.shape, number) for part in LAYOUT.tensors}
            arena.write(ExpertId(layer, expert), tensors)
    return arena


@contextmanager
def stack(slots: int, **options: object) -> Iterator[ExpertStack]:
    with open_stack(numbered_arena(), NUM_LAYERS, StackOptions(slots, **options)) as opened:  # type: ignore[arg-type]
        yield opened


def ids(needed: list[int]) -> IdArray:
    """One token's routing."""
    return np.array([needed], np.uint16)


def use(opened: ExpertStack, layer: int, needed: list[int]) -> tuple[tuple[int, ...], list[int]]:
    """One layer's step; checks the bytes of every slot handed out. Returns (hits, order of arrival)."""
    arrived: list[int] = []
    with opened.expert_cache.acquire(layer, needed, ids(needed)) as acquisition:
        for expert, slot_index in opened.expert_cache.arrivals(acquisition):
            held = bytes(opened.slots_SB[slot_index][: LAYOUT.blob_nbytes].numpy().tobytes())
            assert held == opened.arena.bytes_of(ExpertId(layer, expert)), "a slot holds the expert it is handed out as"
            arrived.append(expert)
        hits = acquisition.hits
    return hits, arrived


steps = st.lists(
    st.tuples(
        st.integers(0, NUM_LAYERS - 1),
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS, unique=True),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    steps=steps,
    slots=st.integers(1, NUM_EXPERTS),
    chunk_nbytes=st.sampled_from([7, 64, 1 << 20]),
    eviction=st.sampled_from(sorted(EVICTIONS)),
    serial=st.booleans(),
)
def test_every_needed_expert_is_handed_out_once_with_its_own_bytes(
    steps: list[tuple[int, list[int]]], slots: int, chunk_nbytes: int, eviction: str, serial: bool
) -> None:
    with stack(slots, chunk_nbytes=chunk_nbytes, eviction=eviction, serial=serial) as opened:
        for layer, needed in steps:
            hits, arrived = use(opened, layer, needed)
            assert sorted(arrived) == sorted(needed)
            assert arrived[: len(hits)] == list(hits) or serial, "what is there is computed first"
            opened.expert_cache.check_integrity()
            assert opened.expert_cache.occupancy(layer).resident <= slots
        counters = opened.expert_cache.counters
        assert sum(c.hits + c.misses for c in counters) == sum(len(needed) for _, needed in steps)
        uploaded = opened.transfers.stats().uploaded_nbytes
        assert uploaded == sum(c.misses for c in counters) * LAYOUT.blob_nbytes, "a miss is one expert's bytes"


@settings(max_examples=60, deadline=None)
@given(steps=steps, slots=st.integers(2, NUM_EXPERTS))
def test_lru_hits_are_those_of_a_plain_lru(steps: list[tuple[int, list[int]]], slots: int) -> None:
    """The oracle: an ordered dict per layer, touched in the order of acquisition (hits, then loads)."""
    oracle: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_LAYERS)]
    with stack(slots) as opened:
        for layer, needed in steps:
            wanted = needed[:slots]
            held = oracle[layer]
            expected = tuple(e for e in wanted if e in held)
            hits, _ = use(opened, layer, wanted)
            assert hits == expected
            for expert in (*expected, *(e for e in wanted if e not in expected)):
                held[expert] = None
                held.move_to_end(expert)
                if len(held) > slots:
                    held.popitem(last=False)


def test_a_layer_that_needs_more_than_its_slots_is_streamed() -> None:
    with stack(1) as opened:
        hits, arrived = use(opened, 0, [4, 2, 0, 5])
        assert (hits, arrived) == ((), [4, 2, 0, 5])
        hits, arrived = use(opened, 0, [3, 5, 1])
        assert (hits, arrived) == ((5,), [5, 3, 1]), "what is resident is used before it gives way"
        assert opened.expert_cache.evictions[0] == 3 + 2


def test_warming_fills_every_slot_and_counts_nothing() -> None:
    with stack(4) as opened:
        opened.expert_cache.warm()
        assert opened.expert_cache.occupancy(1) == LayerOccupancy(resident=4, loading=0)
        assert opened.expert_cache.counters[1].misses == 0
        assert use(opened, 1, [0, 3])[0] == (0, 3)


def test_a_quarantined_expert_fails_the_step_and_leaves_the_cache_whole() -> None:
    with stack(3) as opened:
        use(opened, 0, [1])
        opened.arena.absent.add(ExpertId(0, 2))
        with pytest.raises(Unavailable, match="L0E2 is quarantined"):
            use(opened, 0, [1, 2, 4])
        opened.expert_cache.check_integrity()
        assert use(opened, 0, [1, 4])[0][0] == 1, "what was there is still there"
        opened.arena.absent.clear()
        assert sorted(use(opened, 0, [2, 1])[1]) == [1, 2]


def test_compute_that_fails_in_the_middle_leaves_no_pins() -> None:
    with stack(2) as opened:

        def compute_and_fail() -> None:
            with opened.expert_cache.acquire(0, [0, 1, 2, 3], ids([0, 1, 2, 3])) as acquisition:
                next(opened.expert_cache.arrivals(acquisition))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            compute_and_fail()
        opened.expert_cache.check_integrity()
        assert sorted(use(opened, 0, [0, 1, 2, 3])[1]) == [0, 1, 2, 3]


def test_a_retired_blob_is_forgotten() -> None:
    with stack(3) as opened:
        use(opened, 0, [1, 2])
        opened.expert_cache.blob_retired(ExpertId(0, 1))
        opened.expert_cache.blob_retired(ExpertId(0, 5))  # not resident: nothing to forget
        tensors = {part.name: torch.full(part.shape, 99.0) for part in LAYOUT.tensors}
        opened.arena.write(ExpertId(0, 1), tensors)
        assert use(opened, 0, [1, 2])[0] == (2,), "the new bytes are loaded, the neighbour stays"


class CountingDevice(CpuDevice):
    """Counts how often everything under way was awaited."""

    num_synchronized = 0

    def synchronize(self) -> None:
        self.num_synchronized += 1


@pytest.mark.parametrize("expert", [1, 5], ids=["resident", "evicted"])
def test_retirement_waits_for_copies_that_only_compute_was_told_to_wait_for(expert: int) -> None:
    device = CountingDevice()
    with stack(3, device=device) as opened:
        use(opened, 0, [1, 2])
        before = device.num_synchronized
        opened.expert_cache.blob_retired(ExpertId(0, expert))
        assert device.num_synchronized == before + 1


def test_another_thread_computes_only_with_what_has_arrived() -> None:
    device = CountingDevice()
    with stack(3, device=device) as opened:
        use(opened, 0, [1, 2])
        before = device.num_synchronized
        use(opened, 1, [1, 2])
        use(opened, 0, [1, 2])
        assert device.num_synchronized == before, "one thread's stream knows what it waited for"
        other = threading.Thread(target=use, args=(opened, 0, [1, 2]))
        other.start()
        other.join(DEADLINE_S)
        assert device.num_synchronized == before + 1
        use(opened, 0, [1, 2])
        assert device.num_synchronized == before + 2, "and back"


def test_retirement_waits_for_the_layer_that_computes_with_the_blob() -> None:
    with stack(3) as opened:
        done = threading.Event()

        def retire() -> None:
            opened.expert_cache.blob_retired(ExpertId(0, 1))
            done.set()

        retirer = threading.Thread(target=retire)
        with opened.expert_cache.acquire(0, [1], ids([1])) as acquisition:
            for _ in opened.expert_cache.arrivals(acquisition):
                retirer.start()
                assert not done.wait(0.05), "the blob is being computed with"
        retirer.join(DEADLINE_S)
        assert done.is_set()
        assert use(opened, 0, [1])[0] == ()


def test_retirement_does_not_wait_for_whoever_has_the_slot_next() -> None:
    with stack(1) as opened:
        retirer = threading.Thread(target=opened.expert_cache.blob_retired, args=(ExpertId(0, 1),))
        with opened.expert_cache.acquire(0, [1, 2], ids([1, 2])) as acquisition:
            arrivals = opened.expert_cache.arrivals(acquisition)
            slot = opened.expert_cache._table.slots[next(arrivals)[1]]
            retirer.start()
            while not slot.doomed:
                retirer.join(0.001)
            assert next(arrivals) == (2, slot.index), "streamed through the only slot"
            retirer.join(DEADLINE_S)
            assert not retirer.is_alive()


def test_integrity_is_checked_for_real() -> None:
    with stack(2) as opened:
        use(opened, 0, [1])
        slot = opened.expert_cache._table.slot_of[0].pop(1)
        with pytest.raises(AssertionError, match="the index finds L0E1"):
            opened.expert_cache.check_integrity()
        opened.expert_cache._table.slot_of[0][1] = slot


def test_an_unknown_policy_is_refused_with_the_table() -> None:
    with pytest.raises(ValueError, match=r"compute.eviction is 'best'; allowed: lru, lfu"):
        eviction_named("best")
