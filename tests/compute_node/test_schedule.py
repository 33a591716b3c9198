"""Named policies, hints in the book, the pace, and what prefetching is worth."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest

from compute_node.config import ComputeConfig
from compute_node.eviction import EVICTIONS, WorthBy, eviction_named, lfu, lru, next_use, promoe, static
from compute_node.expert_history import ExpertHistory
from compute_node.hint_book import HintBook
from compute_node.pace import Pace
from compute_node.prefetch_worth import FEWEST_PREFETCHES, REST_VISITS, PrefetchWorth
from compute_node.schedule import POLICIES, HintUse, SlotSplit, policy_named
from promoe.config import Settings, SettingUnfit
from promoe.hint import Hint
from promoe.ids import ExpertId
from promoe.trace_events import HintFate


def order_of(worth_E: Iterable[float]) -> list[int]:
    """Experts, worth least first."""
    worth = list(worth_E)
    return sorted(range(len(worth)), key=lambda expert: worth[expert])


def best_of(worth_E: Iterable[float]) -> int:
    return order_of(worth_E)[-1]


def asked(*assignments: str) -> ComputeConfig:
    settings = Settings(None, ["compute.pack=/pack", "compute.store_endpoint=unix:/s", *assignments])
    return settings.section("compute", ComputeConfig)


def hint(step: int, layer: int) -> Hint:
    return Hint(step, layer, step, 0, np.array([1], np.uint16), np.array([0.5], np.float32), 1, "a@1")


class TestPolicies:
    def test_a_named_set_can_be_changed_setting_by_setting(self) -> None:
        policy = asked("compute.policy=promoe", "compute.eviction=lfu", "compute.reorder=false").schedule()
        assert (policy.name, policy.eviction, policy.reorder) == ("promoe", "lfu", False)
        assert policy.hints is HintUse.TOP
        assert asked("compute.slot_split=layer").schedule().slot_split is SlotSplit.LAYER

    def test_ours_is_the_default(self) -> None:
        assert asked().schedule() == POLICIES["proactive"]

    @pytest.mark.parametrize("assignment", ["compute.policy=best", "compute.eviction=best", "compute.hints=some"])
    def test_unknown_names_are_refused_with_the_known_ones(self, assignment: str) -> None:
        with pytest.raises(ValueError, match="allowed: "):
            asked(assignment).schedule()

    def test_the_reactive_policy_takes_no_hints(self) -> None:
        assert policy_named("lru").hints is HintUse.IGNORE
        with pytest.raises(SettingUnfit, match="lru, promoe, proactive"):
            policy_named("")

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("blob_nbytes", [100, 83_000, 17_000_000, 352_000_000])
    def test_chunks_are_shares_of_an_expert_within_reason(self, name: str, blob_nbytes: int) -> None:
        policy = POLICIES[name]
        chunk_nbytes = policy.chunk_settings(blob_nbytes).chunk_nbytes
        if policy.chunks_per_expert == 1:
            assert chunk_nbytes is None
        else:
            assert chunk_nbytes is not None
            assert chunk_nbytes >= 16 << 10
            assert chunk_nbytes % 4096 == 0
            assert chunk_nbytes <= 2 << 20 or policy.largest_chunk_nbytes is None

    def test_the_papers_chunks_are_an_experts_three_matrices_however_large(self) -> None:
        blob_nbytes = 3 * 2048 * 1408 * 2
        assert POLICIES["promoe"].chunk_settings(blob_nbytes).chunk_nbytes == blob_nbytes // 3
        assert POLICIES["proactive"].chunk_settings(blob_nbytes).chunk_nbytes == 2 << 20

    def test_chunks_asked_for_in_bytes_are_taken(self) -> None:
        assert asked("compute.chunk_bytes=12345").schedule().chunk_settings(10**6).chunk_nbytes == 12345


class TestEvictions:
    def known(self) -> ExpertHistory:
        history = ExpertHistory(2, 4, 1)
        for experts in ([0], [0], [0], [1], [2]):
            history.routed(0, experts, None, 1)
        return history

    def test_each_keeps_by_its_own_measure(self) -> None:
        history = self.known()
        history.loaded(ExpertId(0, 0), is_needed=True)
        assert best_of(lru(history, 0)) == 2
        assert best_of(lfu(history, 0)) == 2, "among equals since they were loaded the last used"
        assert best_of(static(history, 0)) == 0
        assert order_of(next_use(history, 0))[0] == 3
        history.touched(0, [1])
        assert best_of(promoe(history, 0)) == 1
        assert best_of(lru(history, 0)) == 2

    @pytest.mark.parametrize("name", EVICTIONS)
    def test_worth_within_a_layer_changes_with_its_changes_only(self, name: str) -> None:
        history = self.known()
        worth = WorthBy(eviction_named(name), history)
        changes: list[Callable[[], object]] = [
            lambda: None,
            lambda: history.routed(1, [3], None, 1),
            lambda: history.touched(0, [3]),
            lambda: history.loaded(ExpertId(1, 2), is_needed=False),
            lambda: history.begin_step(4, 2),
            history.reset,
        ]
        for change in changes:
            counted, before = list(worth.changes), [list(worth.within(layer)) for layer in range(2)]
            change()
            for layer in range(2):
                assert worth.changes[layer] != counted[layer] or list(worth.within(layer)) == before[layer]

    def test_only_the_next_use_tells_layers_apart(self) -> None:
        history = self.known()
        for name in EVICTIONS:
            worth = WorthBy(eviction_named(name), history)
            of_layers = [worth.of_layer(layer) for layer in range(2)]
            assert of_layers == ([-2.0, -1.0] if name == "next_use" else [0.0, 0.0])

    def test_what_has_been_used_for_days_stays_the_most_used(self) -> None:
        history = self.known()
        history.uses.num_uses[0][:2] = [1 << 40, (1 << 23) + 1]
        assert order_of(lfu(history, 0)) == [3, 2, 1, 0]

    def test_in_days_of_use_the_last_use_still_decides_between_equals(self) -> None:
        history = self.known()
        history.uses.num_uses[0][:] = [1 << 20] * 4
        history.uses.last_use[0][:] = [(1 << 31) - 3, (1 << 31) - 1, (1 << 31) - 2, 0]
        history.uses.clock = 1 << 31
        assert order_of(lfu(history, 0)) == [3, 0, 2, 1]


class TestHintBook:
    def test_visits_come_in_the_order_of_the_layers_and_into_the_next_step(self) -> None:
        book = HintBook(4)
        list(book.begin_step(1))
        for layer in (0, 1):
            book.routed(layer)
        for step, layer in ((1, 3), (1, 2), (2, 0)):
            assert book.file(hint(step, layer)) is HintFate.TAKEN
        assert [(visit.layer, visit.distance) for visit in book.coming(8)] == [(2, 1), (3, 2), (0, 3)]
        assert [visit.layer for visit in book.coming(2)] == [2, 3]

    def test_hints_for_steps_that_are_over_are_forgotten(self) -> None:
        book = HintBook(2)
        list(book.begin_step(1))
        book.file(hint(1, 1))
        assert list(book.begin_step(2)) == []
        assert book.hint_for(1) is None

    def test_early_hints_come_with_their_step(self) -> None:
        book = HintBook(2)
        list(book.begin_step(1))
        for layer in (0, 1):
            book.routed(layer)
        early = hint(2, 1)
        book.file(early)
        assert list(book.begin_step(2)) == [early]
        book.routed(0)
        book.routed(1)
        assert book.hint_for(1) is None


class TestPace:
    def test_layers_are_timed_without_stalls(self) -> None:
        pace = Pace()
        for layer, now_s in enumerate((1.0, 1.5, 2.0)):
            pace.routed(layer, now_s)
            pace.stalled(0.3)
        assert pace.layer_s == pytest.approx(0.2)

    def test_the_time_between_steps_is_no_layer(self) -> None:
        pace = Pace()
        pace.routed(0, 1.0)
        pace.begin_step(changes_phase=False)
        pace.routed(0, 9.0)
        assert pace.layer_s is None
        pace.routed(1, 9.5)
        assert pace.layer_s == pytest.approx(0.5)
        pace.begin_step(changes_phase=True)
        assert pace.layer_s is None

    def test_a_busy_link_is_seen_as_busy(self) -> None:
        pace = Pace()
        for _ in range(200):
            pace.looked_at_link(is_busy=True)
        assert pace.link_busy_share > 0.99


class TestPrefetchWorth:
    def test_useful_prefetches_keep_it_on(self) -> None:
        worth = PrefetchWorth(2)
        for _ in range(300):
            worth.gained(0, is_late=False)
            worth.wasted(0, moved_share=1.0, link_busy_share=0.9)
        assert worth.is_on(0)

    def test_waste_on_a_busy_link_switches_off_and_it_is_tried_again(self) -> None:
        worth = PrefetchWorth(2)
        wasted = 0
        while worth.is_on(0):
            worth.wasted(0, moved_share=1.0, link_busy_share=1.0)
            wasted += 1
        assert wasted >= FEWEST_PREFETCHES
        assert worth.is_on(1), "its neighbour goes on"
        for _ in range(REST_VISITS):
            assert not worth.is_on(0)
            worth.visited(0)
        assert worth.is_on(0)

    def test_waste_on_an_idle_link_costs_nothing(self) -> None:
        worth = PrefetchWorth(1)
        for _ in range(500):
            worth.wasted(0, moved_share=1.0, link_busy_share=0.0)
        assert worth.is_on(0)
