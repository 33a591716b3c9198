"""Misses of decoding are averaged over the last steps; prompts, which miss nearly everything, do not count."""

import numpy as np

from compute_node.miss_watch import MANY_MISSES, MEMORY, MissWatch
from promoe.hint import StepSpan
from promoe.trace_events import LayerEvent, StepEvent

SEVERAL_STEPS = round(8 / MEMORY)


def layer(num_hits: int, num_misses: int) -> LayerEvent:
    needed = tuple(range(num_hits + num_misses))
    ids = np.array([needed], np.uint16)
    return LayerEvent(0.0, 0.0, 1, 0, ids, needed[:num_hits], needed[num_hits:], (), 0.0)


def step(is_prefill: bool) -> StepEvent:
    return StepEvent(0.0, 1, (StepSpan("a", 1, False), StepSpan("b", 5, is_prefill)))


def test_it_follows_what_decoding_misses() -> None:
    watch = MissWatch()
    assert not watch.misses_many
    watch(step(is_prefill=False))
    for num_misses, expected in ((3, True), (0, False), (8, True)):
        for _ in range(SEVERAL_STEPS):
            watch(layer(8 - num_misses, num_misses))
        assert watch.misses_many is expected


def test_a_few_layers_do_not_change_it() -> None:
    watch = MissWatch()
    watch(step(is_prefill=False))
    for _ in range(int(MANY_MISSES / MEMORY) - 1):
        watch(layer(0, 8))
    assert not watch.misses_many


def test_prompts_do_not_count() -> None:
    watch = MissWatch()
    watch(step(is_prefill=True))
    for _ in range(SEVERAL_STEPS):
        watch(layer(0, 8))
    assert not watch.misses_many


def test_a_layer_that_needs_nothing_is_no_miss() -> None:
    watch = MissWatch()
    watch(step(is_prefill=False))
    watch(layer(0, 0))
    assert not watch.misses_many
