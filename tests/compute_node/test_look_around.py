"""When the expert cache looks around, and what prompts ask of it: what has to be done is done while compute waits."""

from dataclasses import replace

import numpy as np
import pytest

from compute_node.hint_inbox import ReceivedHint
from compute_node.prefetch import MOST_STREAMED_SHARE
from compute_node.schedule import POLICIES
from promoe.hint import Hint
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, LayerEvent, LoadEvent, TraceEvent
from tests.compute_node.expert_stack import ExpertStack
from tests.compute_node.held_links import GatedLink
from tests.compute_node.test_prefetch import LAYOUT, NUM_EXPERTS, NUM_LAYERS, GatedDevice, begin, hint, stack, use

KINDS = {HintEvent: "hint", LoadEvent: "load", LayerEvent: "layer"}


def heard(opened: ExpertStack) -> list[str]:
    """What the cache tells from now on, in order."""
    told: list[str] = []

    def tell(event: TraceEvent) -> None:
        told.append(KINDS.get(type(event), "step"))

    opened.expert_cache.sinks.append(tell)
    return told


def use_and_hint_meanwhile(opened: ExpertStack, layer: int, needed: list[int]) -> None:
    """A hint for the layer after the next comes when the layer's routing is known."""
    with opened.expert_cache.acquire(layer, needed, np.array([needed], np.uint16)) as acquisition:
        opened.hints.put(ReceivedHint(hint(1, layer + 2, [7]), None))
        for _ in opened.expert_cache.arrivals(acquisition):
            pass


@pytest.mark.parametrize("policy", ["promoe", "proactive"])
def test_hints_are_noticed_before_compute_waits(policy: str) -> None:
    with stack(POLICIES[policy], 4) as opened:
        begin(opened, 1)
        told = heard(opened)
        use_and_hint_meanwhile(opened, 0, [0, 1])
        assert told == ["hint", "load", "load", "layer"]


@pytest.mark.parametrize("policy", ["promoe", "proactive"])
def test_where_nothing_is_missed_the_next_layer_begins_with_the_look(policy: str) -> None:
    with stack(POLICIES[policy], NUM_EXPERTS) as opened:
        opened.expert_cache.warm()
        begin(opened, 1)
        told = heard(opened)
        use_and_hint_meanwhile(opened, 0, [0, 1])
        assert told == ["layer"]
        opened.expert_cache.notice()
        assert told == ["layer", "hint"]


def test_reactive_lru_looks_when_it_did_before() -> None:
    """The baseline asks for one miss after the other; nothing is done between them."""
    with stack(POLICIES["lru"], 4) as opened:
        begin(opened, 1)
        told = heard(opened)
        use_and_hint_meanwhile(opened, 0, [0, 1])
        assert told == ["load", "load", "layer"]


def test_after_the_last_layer_the_link_gets_work_until_the_next_step() -> None:
    with stack(POLICIES["proactive"], 4) as opened:
        for step in (1, 2):
            begin(opened, step)
            for layer in range(NUM_LAYERS):
                use(opened, layer, [[0, 1]])
        begin(opened, 2)
        with opened.expert_cache.acquire(NUM_LAYERS - 1, [0, 1], np.array([[0, 1]], np.uint16)) as acquisition:
            assert acquisition.misses == ()
            opened.hints.put(ReceivedHint(replace(hint(3, 0, [6, 7]), observed_step=2), None))
            for _ in opened.expert_cache.arrivals(acquisition):
                pass
        assert {slot.expert for slot in opened.expert_cache._table.held(0)} >= {ExpertId(0, 6), ExpertId(0, 7)}


def test_a_layer_that_is_streamed_through_few_slots_gives_none_of_them_to_prefetches() -> None:
    """It does not look around before it is over."""
    with stack(POLICIES["proactive"], 1) as opened:
        begin(opened, 1)
        told = heard(opened)
        needed = list(range(NUM_EXPERTS))
        with opened.expert_cache.acquire(0, needed, np.array([needed], np.uint16)) as acquisition:
            assert acquisition.waiting, "there are fewer slots than it needs"
            opened.hints.put(ReceivedHint(hint(1, 2, [5, 6]), None))
            computed = [expert for expert, _ in opened.expert_cache.arrivals(acquisition)]
        assert sorted(computed) == needed
        assert told == NUM_EXPERTS * ["load"] + ["layer"]


def test_all_that_is_missing_is_asked_for_before_anything_is_computed() -> None:
    link = GatedLink()
    with stack(POLICIES["proactive"], 4, device=GatedDevice(link)) as opened:
        try:
            begin(opened, 1)
            with opened.expert_cache.acquire(0, [2, 5], np.array([[2, 5]], np.uint16)) as acquisition:
                assert sorted(acquisition.pinned) == [2, 5]
                assert opened.transfers.queued_nbytes() > 0
                link.gate.release(1000)
                assert sorted(expert for expert, _ in opened.expert_cache.arrivals(acquisition)) == [2, 5]
        finally:
            link.gate.release(1000)


def test_what_was_expected_of_the_next_token_means_nothing_to_a_prompt() -> None:
    with stack(POLICIES["proactive"], 4) as opened:
        begin(opened, 1)
        for layer in range(NUM_LAYERS):
            use(opened, layer, [[0, 1]])
        before, after = (replace(hint(2, layer, [6, 7], [0.9, 0.8]), observed_step=1) for layer in (0, 1))
        opened.hints.put(ReceivedHint(before, None))
        opened.expert_cache.notice()
        begin(opened, 2, num_tokens=64, is_prefill=True)
        opened.hints.put(ReceivedHint(after, None))
        opened.expert_cache.notice()
        for layer in (0, 1):
            assert min(opened.expert_cache._history.next_probabilities_of(layer)) > 0.9, "a prompt needs nearly all"


@pytest.mark.parametrize("slots", [2, 4, NUM_EXPERTS])
def test_a_prompts_next_layer_is_queued_whole_but_for_a_quarter_of_the_slots(slots: int) -> None:
    link = GatedLink()
    with stack(POLICIES["proactive"], slots, device=GatedDevice(link)) as opened:
        try:
            begin(opened, 1, num_tokens=64, is_prefill=True)
            loading = opened.expert_cache.occupancy(0).loading
            assert loading == min(NUM_EXPERTS, max(2, int(NUM_LAYERS * slots * MOST_STREAMED_SHARE)))
            assert opened.transfers.queued_nbytes() <= loading * LAYOUT.blob_nbytes
        finally:
            link.gate.release(1000)


def test_what_the_end_of_a_prompt_says_of_the_next_token_counts_at_once() -> None:
    with stack(POLICIES["proactive"], 4) as opened:
        begin(opened, 2, num_tokens=64, is_prefill=True)
        use(opened, 0, [[0, 1]])
        said: Hint = replace(hint(3, 0, [6], [0.95]), observed_step=2, observed_layer=NUM_LAYERS - 1)
        opened.hints.put(ReceivedHint(said, None))
        opened.expert_cache.notice()
        assert opened.expert_cache._history.next_probability_of(ExpertId(0, 6)) == pytest.approx(0.95)


def test_a_sample_that_was_still_on_its_way_leaves_with_the_first_expert() -> None:
    """On a GPU it is copied to the host beside the compute that was queued before."""
    with stack(POLICIES["proactive"], NUM_EXPERTS) as opened:
        opened.expert_cache.warm()
        begin(opened, 1)
        flushed: list[int] = []
        with opened.expert_cache.acquire(0, [0, 1], np.array([[0, 1]], np.uint16)) as acquisition:
            opened.hints.flush = lambda: flushed.append(len(flushed))
            arrivals = opened.expert_cache.arrivals(acquisition)
            next(arrivals)
            assert flushed == []
            next(arrivals)
            assert flushed == [0]
            assert list(arrivals) == []
        assert flushed == [0]


def test_what_found_no_slot_while_a_layer_held_them_all_is_looked_at_again() -> None:
    """A prompt in a cache of little more than one layer: the look in its middle finds nothing to give up."""
    with stack(POLICIES["proactive"], 2) as opened:
        everything = list(range(NUM_EXPERTS))
        ids_TK = np.array([[number, (number + 1) % NUM_EXPERTS] for number in everything], np.uint16)
        begin(opened, 1, num_tokens=len(everything), is_prefill=True)
        for layer in range(NUM_LAYERS - 1):
            with opened.expert_cache.acquire(layer, everything, ids_TK) as acquisition:
                for _ in opened.expert_cache.arrivals(acquisition):
                    pass
            opened.expert_cache.notice()
            assert opened.expert_cache._prefetcher.num_loading > 0, f"layer {layer + 1} is streamed"
