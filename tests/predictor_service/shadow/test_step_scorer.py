"""Both sides are scored on the same layers, by what was routed there, and nobody by what could not be known."""

import numpy as np

from predictor_service.shadow.step_scorer import StepScorer
from predictor_service.shadow.tally import StepComparison, VersionTally
from promoe.hint import Hint, LayerRouting, Observation, StepSpan, StepStart

ONE = StepSpan("r1", 1, is_prefill=False)
TWO = StepSpan("r2", 1, is_prefill=False)
PROMPT = StepSpan("r3", 4, is_prefill=True)


class Account:
    """A scorer of `a@1`'s hints beside the shadow `s@1`, and what it tells."""

    def __init__(self, shadow: str = "s@1") -> None:
        self.tallies: dict[str, VersionTally] = {}
        self.comparisons: list[StepComparison] = []
        self.scorer = StepScorer(lambda v: self.tallies.setdefault(v, VersionTally()), shadow, self.comparisons.append)
        self.step = 0

    def begin(self, *spans: StepSpan) -> None:
        self.step += 1
        self.scorer.begin_step(StepStart(self.step, spans or (ONE,), version="a@1"))

    def hint(self, version: str, layer: int, experts: list[int], num_expected: int = 2, step: int = 0) -> Hint:
        ids = np.array(experts, np.uint16)
        scores = np.linspace(1, 0.5, len(experts), dtype=np.float32)
        return Hint(step or self.step, layer, self.step, 0, ids, scores, num_expected, version)

    def observe(
        self, hints: list[Hint], routed: dict[int, list[list[int]]], ready: tuple[int, ...] | None = None, rows: int = 1
    ) -> None:
        num_tokens = len(next(iter(routed.values()))) if routed else rows
        routings = tuple(LayerRouting(layer, np.array(ids, np.uint16), ready) for layer, ids in routed.items())
        self.scorer.observe(Observation(self.step, 0, tuple(range(rows)), num_tokens, None, routings), hints)


def test_both_are_scored_by_what_was_routed() -> None:
    account = Account()
    account.begin()
    account.observe([account.hint("a@1", 1, [5, 6, 7]), account.hint("s@1", 1, [6, 5, 2])], {})
    account.observe([], {1: [[5, 7]]}, ready=(5, 2))
    account.begin()
    active, shadow = account.tallies["a@1"], account.tallies["s@1"]
    assert (active.steps, active.layers, active.hinted, active.correct, active.ready) == (1, 1, 2, 1, 1)
    assert (active.found, active.routed) == (1, 2), "among the first two, as many as were routed"
    assert (shadow.found, shadow.ready, shadow.routed) == (1, 1, 2)
    assert account.comparisons == [StepComparison(("r1",), "a@1", "s@1", 0.5, 0.5)]


def test_who_says_nothing_finds_nothing() -> None:
    account = Account()
    account.begin()
    account.observe([account.hint("s@1", 1, [5, 7])], {})
    account.observe([account.hint("a@1", 2, [1, 2])], {1: [[5, 7]]})
    account.observe([], {2: [[1, 9]]})
    account.scorer.end_step()
    (comparison,) = account.comparisons
    assert (comparison.active_score, comparison.shadow_score) == (1 / 4, 2 / 4)
    assert account.tallies["a@1"].layers == account.tallies["s@1"].layers == 2


def test_a_layer_that_nobody_hinted_is_left_out() -> None:
    account = Account()
    account.begin()
    account.observe([], {1: [[5, 7]]})
    account.scorer.end_step()
    assert (account.tallies, account.comparisons) == ({}, [])


def test_what_comes_with_the_routing_is_late() -> None:
    account = Account()
    account.begin()
    account.observe([account.hint("a@1", 1, [5, 7])], {1: [[5, 7]]})
    account.scorer.end_step()
    assert account.tallies == {}


def test_hints_for_the_next_step_are_kept_and_older_ones_are_not() -> None:
    account = Account()
    account.begin()
    account.observe([account.hint("a@1", 0, [1, 2], step=2), account.hint("a@1", 1, [8, 9])], {})
    account.begin()
    account.observe([], {0: [[1, 2]], 1: [[8, 9]]})
    account.scorer.end_step()
    assert (account.tallies["a@1"].layers, account.tallies["a@1"].found) == (1, 2)


def test_a_newer_hint_replaces_an_older_one() -> None:
    account = Account()
    account.begin()
    account.observe([account.hint("a@1", 1, [1, 2])], {})
    account.observe([account.hint("a@1", 1, [3, 4])], {})
    account.observe([], {1: [[3, 4]]})
    assert (account.tallies["a@1"].found, account.tallies["a@1"].hinted) == (2, 2)


def test_prompts_and_half_shown_steps_are_not_scored() -> None:
    account = Account()
    account.begin(ONE, PROMPT)
    account.observe([account.hint("a@1", 1, [1, 2])], {})
    account.observe([], {1: [[1, 2]] * 5}, rows=5)
    account.begin(ONE, TWO)
    account.observe([account.hint("a@1", 1, [1, 2])], {}, rows=1)
    account.scorer.observe(
        Observation(account.step, 1, (0,), 2, None, (LayerRouting(1, np.array([[1, 2]], np.uint16)),)), []
    )
    account.scorer.end_step()
    assert account.tallies == {}


def test_the_union_of_a_batch_is_what_is_needed() -> None:
    account = Account()
    account.begin(ONE, TWO)
    account.observe([account.hint("a@1", 1, [1, 2, 3, 4], num_expected=3)], {}, rows=2)
    account.observe([], {1: [[1, 2], [2, 4]]}, rows=2)
    account.scorer.end_step()
    tally = account.tallies["a@1"]
    assert (tally.routed, tally.found, tally.hinted, tally.correct) == (3, 2, 3, 2)
    assert account.comparisons[0].request_ids == ("r1", "r2")


def test_a_step_of_two_versions_each_for_its_own_requests_is_not_scored() -> None:
    account = Account()
    account.begin(ONE, TWO)
    account.observe([account.hint("a@1", 1, [1, 2]), account.hint("c@1", 1, [3, 4])], {}, rows=2)
    account.observe([], {1: [[1, 2], [3, 4]]}, rows=2)
    account.scorer.end_step()
    assert (account.tallies, account.comparisons) == ({}, [])


def test_without_a_shadow_the_service_s_own_hints_are_scored() -> None:
    account = Account(shadow="")
    account.begin()
    account.observe([account.hint("a@1", 1, [5, 6])], {})
    account.observe([], {1: [[5, 7]]})
    account.scorer.end_step()
    assert account.tallies["a@1"].found == 1
    assert account.comparisons == []


def test_what_is_of_another_step_is_left_out() -> None:
    account = Account()
    account.scorer.observe(Observation(1, 0, (0,), 1), [])
    account.begin()
    account.scorer.observe(Observation(9, 0, (0,), 1, None, (LayerRouting(0, np.array([[1, 2]], np.uint16)),)), [])
    account.scorer.end_step()
    assert account.tallies == {}
