"""Hints are scored as a slow look at each of them says, whatever the order of steps, hints and layers."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.hint_quality import BOUNDS_S, MAX_VERSIONS, DurationCounts, HintScores, ScoreKey
from compute_node.step_ledger import Phase
from promoe.hint import Hint, StepSpan
from promoe.trace_events import HintEvent, HintFate, LayerEvent, StepEvent, TraceEvent

NUM_LAYERS, NUM_EXPERTS = 3, 6


def hint(
    visit: tuple[int, int], observed: tuple[int, int], experts: list[int], num_expected: int = 2, version: str = "a@1"
) -> Hint:
    scores = np.linspace(1, 0.1, len(experts)).astype(np.float32)
    return Hint(*visit, *observed, np.array(experts, np.uint16), scores, num_expected, version)


def layer_event(visit: tuple[int, int], routed: set[int], ready: set[int], at_s: float = 0.0) -> LayerEvent:
    step, layer = visit
    hits, misses = tuple(sorted(routed & ready)), tuple(sorted(routed - ready))
    ids_TK = np.array([sorted(routed)], np.uint16)
    return LayerEvent(at_s, at_s, step, layer, ids_TK, hits, misses, (), 0.0, ready=tuple(sorted(ready)))


def step_event(step: int, *, is_prefill: bool = False) -> StepEvent:
    return StepEvent(0.0, step, (StepSpan("r", 1, False), StepSpan("s", 1, is_prefill)))


def told(*events: TraceEvent) -> HintScores:
    scores = HintScores(NUM_LAYERS)
    for event in events:
        scores(event)
    return scores


def test_one_hint_by_hand() -> None:
    scores = told(
        step_event(1),
        HintEvent(1.0, hint((1, 2), (1, 0), [5, 0, 3, 4], 2), HintFate.TAKEN, 0.003),
        layer_event((1, 2), routed={0, 4}, ready={5, 0, 1}, at_s=1.004),
    )
    ((key, score),) = scores.scores()
    assert key == ScoreKey("a@1", 2, 2, Phase.DECODE)
    assert (score.hints, score.hinted, score.correct, score.ready, score.routed) == (1, 2, 1, 2, 2)
    assert score.found == (0, 1, 1, 2), "recall at 1, 2, 3, 4"
    assert scores.fates == {HintFate.TAKEN: 1}
    assert [BOUNDS_S[i] for i, count in enumerate(scores.latency_s.counts) if count] == [0.005]
    assert [BOUNDS_S[i] for i, count in enumerate(scores.time_until_use_s.counts) if count] == [0.005]


def test_the_last_output_looks_into_the_next_step() -> None:
    scores = told(
        step_event(4),
        HintEvent(0, hint((5, 1), (4, NUM_LAYERS), [1], 1), HintFate.TAKEN),
        step_event(5, is_prefill=True),
        layer_event((5, 1), {1}, set()),
    )
    assert [key for key, _ in scores.scores()] == [ScoreKey("a@1", 1, 1, Phase.PREFILL)]


def test_a_newer_hint_of_the_same_lookahead_is_the_one_that_counts() -> None:
    scores = told(
        step_event(1),
        HintEvent(0, hint((1, 2), (1, 1), [0]), HintFate.TAKEN),
        HintEvent(0, hint((1, 2), (1, 0), [5]), HintFate.TAKEN),
        HintEvent(0, hint((1, 2), (1, 1), [1]), HintFate.TAKEN),
        layer_event((1, 2), {1}, {1}),
    )
    assert {key.lookahead: score.correct for key, score in scores.scores()} == {1: 1, 2: 0}


def test_old_versions_are_forgotten() -> None:
    events: list[TraceEvent] = []
    for number in range(MAX_VERSIONS + 3):
        events += [
            step_event(number + 1),
            HintEvent(0, hint((number + 1, 1), (number + 1, 0), [0], version=f"a@{number}"), HintFate.TAKEN),
            layer_event((number + 1, 1), {0}, {0}),
        ]
    versions = [key.version for key, _ in told(*events).scores()]
    assert versions == [f"a@{number}" for number in range(3, MAX_VERSIONS + 3)]


def test_a_restart_forgets_what_was_counted() -> None:
    scores = told(
        step_event(1), HintEvent(0, hint((1, 1), (1, 0), [0]), HintFate.TAKEN, 0.1), layer_event((1, 1), {0}, {0})
    )
    scores.restart()
    assert (scores.scores(), scores.fates, sum(scores.latency_s.counts)) == ([], {}, 0)


visits = st.tuples(st.integers(1, 4), st.integers(0, NUM_LAYERS - 1))
hint_lists = st.lists(
    st.tuples(
        visits,
        st.integers(0, NUM_LAYERS),
        st.permutations(range(NUM_EXPERTS)).flatmap(lambda p: st.integers(0, NUM_EXPERTS).map(lambda n: p[:n])),
        st.integers(0, NUM_EXPERTS),
        st.sampled_from(["a@1", "b@2"]),
        st.sampled_from([HintFate.TAKEN, HintFate.TAKEN, HintFate.LATE, HintFate.INVALID]),
    ),
    max_size=25,
)
expert_sets = st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1)


@settings(max_examples=60)
@given(hint_lists, st.data())
def test_the_scores_are_those_of_a_slow_look(
    drawn: list[tuple[tuple[int, int], int, list[int], int, str, HintFate]], data: st.DataObject
) -> None:
    """The hints of a step come at its beginning; a layer is scored against the last hint for its visit of each kind."""
    scores = HintScores(NUM_LAYERS)
    expected: dict[ScoreKey, list[int]] = defaultdict(lambda: [0] * (5 + NUM_EXPERTS))
    num_taken = 0
    for step in range(1, 5):
        is_prefill = data.draw(st.booleans())
        scores(step_event(step, is_prefill=is_prefill))
        of_step: dict[tuple[int, str, int], Hint] = {}
        for (hinted_step, layer), observed_layer, experts, num_expected, version, fate in drawn:
            if hinted_step != step:
                continue
            made = hint(
                (step, layer), (step - (observed_layer > layer), observed_layer), experts, num_expected, version
            )
            scores(HintEvent(0.0, made, fate))
            if fate is HintFate.TAKEN:
                num_taken += 1
                lookahead = layer - observed_layer + (NUM_LAYERS if observed_layer > layer else 0)
                of_step[layer, version, lookahead] = made
        for layer in range(NUM_LAYERS):
            routed, ready = data.draw(expert_sets), data.draw(expert_sets)
            scores(layer_event((step, layer), routed, ready))
            for (hinted_layer, version, lookahead), made in of_step.items():
                if hinted_layer != layer:
                    continue
                phase = Phase.PREFILL if is_prefill else Phase.DECODE
                counts = expected[ScoreKey(version, layer, lookahead, phase)]
                experts = made.experts.tolist()
                head = experts[: made.num_expected]
                for place, amount in enumerate(
                    [1, len(head), len(routed & set(head)), len(ready & set(head)), len(routed)]
                ):
                    counts[place] += amount
                for n in range(NUM_EXPERTS):
                    counts[5 + n] += len(routed & set(experts[: n + 1]))
    told_scores = {
        key: [s.hints, s.hinted, s.correct, s.ready, s.routed, *_padded(s.found)] for key, s in scores.scores()
    }
    assert told_scores == expected
    assert scores.fates[HintFate.TAKEN] == num_taken


def _padded(found: tuple[int, ...]) -> list[int]:
    last = found[-1] if found else 0
    return [*found, *[last] * (NUM_EXPERTS - len(found))]


@pytest.mark.parametrize(("duration_s", "bucket"), [(0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_duration_is_in_the_bucket_whose_bound_it_does_not_pass(duration_s: float, bucket: int) -> None:
    histogram = DurationCounts((1.0, 2.0))
    histogram.add(duration_s)
    assert histogram.counts.index(1) == bucket


def test_an_order_becomes_probabilities_by_what_came_of_it_in_decoding() -> None:
    scores = HintScores(NUM_LAYERS)
    for step in range(1, 400):
        hinted = scores.calibrated(hint((step, 2), (step, 0), [5, 0, 3]))
        scores(step_event(step, is_prefill=step % 2 == 0))
        scores(HintEvent(0.0, hinted, HintFate.TAKEN))
        scores(layer_event((step, 2), {5, 0, 3} if step % 2 == 0 else {5}, set()))
    assert scores.calibrated(hint((400, 2), (400, 0), [1, 2, 3])).scores.tolist() == pytest.approx([1, 0, 0], abs=0.1)
