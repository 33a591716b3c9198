"""Rates are differences of counters over the time between two looks at the same process."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cli.node_history import WINDOW_S, HintTotals, NodeHistory, Window, hint_totals
from promoe.node_report import CacheStats, StepPhase
from tests.promoe.node_samples import VERSION, cache_stats, node_sample


def tokens(stats: CacheStats) -> float:
    return stats.decode.tokens


def hits(stats: CacheStats) -> float:
    return stats.decode.hits


@given(st.lists(st.tuples(st.floats(0.1, 4.0), st.integers(0, 9)), min_size=2, max_size=30))
def test_the_window_is_what_happened_in_it(pauses: list[tuple[float, int]]) -> None:
    history = NodeHistory()
    at_s, num_steps = 0.0, 5
    looks: list[tuple[float, int]] = []
    for pause_s, steps in pauses:
        at_s, num_steps = at_s + pause_s, num_steps + steps
        looks.append((at_s, num_steps))
        history.add(node_sample(at_s, num_steps))
    window = history.lately()
    assert window is not None
    first = next(look for look in looks if at_s - look[0] == window.elapsed_s)
    assert window.delta(tokens) == num_steps - first[1]
    assert window.per_s(tokens) == (num_steps - first[1]) / window.elapsed_s
    # As short as it can be with at least WINDOW_S of history, where there is that much.
    later = [look for look in looks[:-1] if look[0] > first[0]]
    assert all(at_s - look[0] < WINDOW_S for look in later)
    assert window.elapsed_s >= WINDOW_S or first == looks[0]


def test_shares_are_of_what_grew() -> None:
    window = Window(cache_stats(10), cache_stats(30), 2.0)
    assert window.share(hits, lambda stats: stats.decode.hits + stats.decode.misses) == 0.8
    assert Window(cache_stats(10), cache_stats(10), 2.0).share(hits, hits) is None
    assert Window(None, cache_stats(30), 0.0).per_s(tokens) is None
    assert Window(None, cache_stats(30), 0.0).delta(tokens) == 30


def test_another_process_begins_anew() -> None:
    history = NodeHistory()
    assert history.last is None
    history.add(node_sample(0.0, 500))
    history.add(node_sample(1.0, 600))
    history.add(node_sample(2.0, 3, instance_id="i2"))
    assert history.lately() is None, "counters of two processes are never subtracted"
    history.add(node_sample(3.0, 5, instance_id="i2"))
    window = history.lately()
    assert window is not None
    assert window.delta(tokens) == 2


def test_hints_are_summed_over_layers_by_lookahead() -> None:
    stats = cache_stats(10)
    totals = hint_totals(stats, VERSION)
    assert totals == {1: HintTotals(2400, 2100, 1800), 2: HintTotals(2400, 1800, 1800)}
    assert hint_totals(stats) == totals
    assert hint_totals(stats, "another@1") == {}
    assert totals[2].accuracy == totals[2].fetch_rate == 0.75
    assert totals[2].good_pred == 0.5625
    assert HintTotals().good_pred is None


def test_prefill_hints_are_not_mixed_in() -> None:
    stats = cache_stats(10)
    prefill = tuple(replace(quality, phase=StepPhase.PREFILL) for quality in stats.hints.qualities)
    mixed = replace(stats, hints=replace(stats.hints, qualities=stats.hints.qualities + prefill))
    assert hint_totals(mixed) == hint_totals(stats)


def test_hints_of_the_window() -> None:
    window = Window(cache_stats(10), cache_stats(12), 1.0)
    assert window.hints(VERSION)[2] == HintTotals(480, 360, 360)
    assert Window(None, cache_stats(12), 0.0).hints(VERSION) == hint_totals(cache_stats(12))
    with pytest.raises(KeyError):
        window.hints(VERSION)[3]
