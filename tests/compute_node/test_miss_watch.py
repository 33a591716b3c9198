"""Misses of decoding are averaged over the last steps; prompts, which miss nearly everything, do not count."""

import numpy as np
import pytest

from compute_node.miss_watch import MANY_MISSES, MEMORY, MissLevel, MissWatch
from promoe.hint import StepSpan
from promoe.trace_events import LayerEvent, StepEvent

SEVERAL_STEPS = round(8 / MEMORY)


def layer(num_hits: int, num_misses: int) -> LayerEvent:
    needed = tuple(range(num_hits + num_misses))
    ids = np.array([needed], np.uint16)
    return LayerEvent(0.0, 0.0, 1, 0, ids, needed[:num_hits], needed[num_hits:], (), 0.0)


def watch_of(is_prefill: bool, cache_rate: float = 0.0) -> MissWatch:
    watch = MissWatch(cache_rate)
    watch(StepEvent(0.0, 1, (StepSpan("a", 1, False), StepSpan("b", 5, is_prefill))))
    return watch


def test_it_follows_what_decoding_misses() -> None:
    watch = watch_of(is_prefill=False)
    for num_hits, num_misses, expected in (
        (5, 3, MissLevel.MANY),
        (8, 0, MissLevel.HARDLY_ANY),
        (95, 5, MissLevel.FEW),
        (0, 8, MissLevel.MANY),
    ):
        for _ in range(SEVERAL_STEPS):
            watch(layer(num_hits, num_misses))
        assert watch.level is expected


def test_many_are_expected_until_some_steps_have_shown_otherwise() -> None:
    watch = watch_of(is_prefill=False)
    assert watch.level is MissLevel.MANY
    for _ in range(round(1 / MEMORY)):
        watch(layer(8, 0))
    assert watch.level is MissLevel.MANY


def test_where_every_expert_has_a_slot_none_is_missed() -> None:
    assert watch_of(is_prefill=False, cache_rate=1.0).level is MissLevel.HARDLY_ANY
    assert watch_of(is_prefill=False, cache_rate=0.75).level is MissLevel.MANY


def test_a_few_layers_change_no_level_by_two() -> None:
    watch = watch_of(is_prefill=False)
    for _ in range(SEVERAL_STEPS):
        watch(layer(8, 0))
    for _ in range(int(MANY_MISSES / MEMORY) - 1):
        watch(layer(0, 8))
    assert watch.level is MissLevel.FEW


@pytest.mark.parametrize(("is_prefill", "num_needed"), [(True, 8), (False, 0)])
def test_prompts_and_layers_that_need_nothing_do_not_count(is_prefill: bool, num_needed: int) -> None:
    watch = watch_of(is_prefill)
    for _ in range(SEVERAL_STEPS):
        watch(layer(num_needed, 0))
    assert watch.level is MissLevel.MANY
