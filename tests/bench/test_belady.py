"""The optimum is no worse than anything a cache could do, found by trying everything on small traces."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.bench.belady import HitCount, RoutedStep, belady

traces = st.lists(st.frozensets(st.integers(0, 3), min_size=1, max_size=2), min_size=1, max_size=6)


def best_of_all(trace: list[frozenset[int]], slots: int) -> int:
    """The most hits over every choice of what to keep after every step."""
    reachable: dict[frozenset[int], int] = {frozenset(): 0}
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


@given(trace=traces, slots=st.integers(1, 4))
def test_belady_is_the_best_of_all_choices(trace: list[frozenset[int]], slots: int) -> None:
    steps = [RoutedStep(experts, is_decode=True) for experts in trace]
    count = belady(steps, slots, frozenset())
    assert count.hits == best_of_all(trace, slots)
    assert count.hits + count.misses == sum(map(len, trace))


def test_only_decode_is_counted_and_prefill_still_moves_experts() -> None:
    steps = [RoutedStep(frozenset({0, 1}), is_decode=False), RoutedStep(frozenset({0, 2}), is_decode=True)]
    assert belady(steps, 2, frozenset()) == HitCount(hits=1, misses=1)
