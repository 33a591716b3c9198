"""The optimum is no worse than anything a cache could do, found by trying everything on small traces."""

import itertools
import random
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.replay.belady import HitCount, PhaseHits, Visit, belady

traces = st.lists(st.frozensets(st.integers(0, 3), min_size=1, max_size=2), min_size=1, max_size=6)


def best_of_all(trace: Sequence[frozenset[int]], slots: int, resident: frozenset[int]) -> int:
    """The most hits over every choice of what to keep after every visit."""
    reachable: dict[frozenset[int], int] = {resident: 0}
    for experts in trace:
        following: dict[frozenset[int], int] = {}
        for held, hits in reachable.items():
            gained = hits + len(held & experts)
            pool = held | experts
            for kept in itertools.combinations(sorted(pool), min(slots, len(pool))):
                state = frozenset(kept)
                following[state] = max(following.get(state, 0), gained)
        reachable = following
    return max(reachable.values())


def lru(trace: Sequence[frozenset[int]], slots: int) -> int:
    """Hits of what the optimum is compared with."""
    held: dict[int, None] = {}
    hits = 0
    for experts in trace:
        hits += len(experts & held.keys())
        for expert in sorted(experts):
            held.pop(expert, None)
            held[expert] = None
        while len(held) > slots:
            del held[next(iter(held))]
    return hits


@given(trace=traces, slots=st.integers(1, 4), warm=st.booleans())
def test_belady_is_the_best_of_all_choices(trace: list[frozenset[int]], slots: int, warm: bool) -> None:
    resident = frozenset(range(slots)) if warm else frozenset()
    count = belady([Visit(experts, is_decode=True) for experts in trace], slots, resident)
    assert count.decode.hits == best_of_all(trace, slots, resident)
    assert count.decode.hits + count.decode.misses == sum(map(len, trace))
    assert count.prefill == HitCount(0, 0)


def test_phases_are_counted_apart_and_prefill_still_moves_experts() -> None:
    visits = [Visit(frozenset({0, 1}), is_decode=False), Visit(frozenset({0, 2}), is_decode=True)]
    assert belady(visits, 2, ()) == PhaseHits(prefill=HitCount(0, 2), decode=HitCount(1, 1))
    assert belady(visits, 2, ()) + belady(visits, 2, ()) == PhaseHits(HitCount(0, 4), HitCount(2, 2))


def layered(seed: int, num_steps: int, num_layers: int) -> list[list[frozenset[int]]]:
    """By layer and step: experts that repeat themselves as text does."""
    chance = random.Random(seed)
    return [
        [frozenset(int(chance.betavariate(1, 3) * 16) for _ in range(2)) for _ in range(num_steps)]
        for _ in range(num_layers)
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0), slots=st.integers(1, 8))
def test_one_pool_is_no_worse_than_equal_shares_and_both_no_worse_than_lru(seed: int, slots: int) -> None:
    layers = layered(seed, num_steps=30, num_layers=3)
    apart = sum((belady([Visit(e, True) for e in layer], slots, ()).decode.hits for layer in layers), 0)
    visits = [
        Visit(frozenset(number * 16 + expert for expert in layer[step]), True)
        for step in range(30)
        for number, layer in enumerate(layers)
    ]
    assert belady(visits, 3 * slots, ()).decode.hits >= apart >= sum(lru(layer, slots) for layer in layers)


def test_a_million_accesses_take_seconds() -> None:
    layers = layered(7, num_steps=2_000, num_layers=10)
    visits = [
        Visit(frozenset(number * 16 + expert for expert in layer[step]), True)
        for step in range(2_000)
        for number, layer in enumerate(layers)
    ]
    num_accesses = sum(len(visit.experts) for visit in visits)
    begin_s = time.perf_counter()
    belady(visits, 80, ())
    assert (time.perf_counter() - begin_s) * 1_000_000 / num_accesses < 30
