"""Skew, overlap, reuse and foresight against brute force and against routings whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cli.routing_statistics import lru_hit_rate, mean, reuse_distances, routing_statistics
from promoe.cli.trace_routing import RoutingCollector, TokenRouting
from promoe.hint import IdArray, StepSpan
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from tests.promoe.traces import MadeUpRun

EXPERTS = 8


def routing_of(ids: list[list[list[int]]], requests: list[int]) -> TokenRouting:
    """By layer, token and k."""
    return TokenRouting(np.array(ids, np.uint16), np.array(requests, np.int64))


def random_ids(num_tokens: int, experts_per_token: int = 2, seed: int = 0) -> IdArray:
    random = np.random.default_rng(seed)
    rows = [random.permutation(EXPERTS)[:experts_per_token] for _ in range(num_tokens)]
    return np.array(rows, np.uint16)


def test_even_use_has_entropy_one_and_a_single_expert_none() -> None:
    even = routing_of([[[expert] for expert in range(EXPERTS)]], [0] * EXPERTS)
    single = routing_of([[[3]] * 4], [0] * 4)
    (layer,) = routing_statistics(even, EXPERTS)
    assert layer.entropy == pytest.approx(1)
    assert layer.busiest_share == 0.25
    (layer,) = routing_statistics(single, EXPERTS)
    assert layer.entropy == pytest.approx(0)
    assert (layer.busiest_share, layer.overlap, layer.chance_overlap) == (1, 1, 1)


def test_overlap_is_between_neighbours_of_one_request() -> None:
    # Two requests take turns, as in a batch: 0 1 | 4 5 | 1 2 | 5 4.
    ids = [[0, 1], [4, 5], [1, 2], [5, 4]]
    (layer,) = routing_statistics(routing_of([ids], [0, 1, 0, 1]), EXPERTS)
    assert layer.overlap == (0.5 + 1) / 2
    (alone,) = routing_statistics(routing_of([ids], [0, 1, 2, 3]), EXPERTS)
    assert alone.overlap is None


def test_overlap_by_chance_is_that_of_tokens_in_any_order() -> None:
    skewed = np.where(random_ids(4000) < 6, random_ids(4000) % 4, random_ids(4000)).astype(np.uint16)
    skewed[:, 1] = (skewed[:, 0] + 1 + skewed[:, 1] % 3) % EXPERTS
    (layer,) = routing_statistics(TokenRouting(skewed[None], np.zeros(4000, np.int64)), EXPERTS)
    assert layer.overlap == pytest.approx(layer.chance_overlap, abs=0.02)


def test_transitions_are_foreseen_where_one_layer_decides_the_next() -> None:
    first = random_ids(400)
    second = ((first + 3) % EXPERTS).astype(np.uint16)  # decided by the layer before
    third = random_ids(400, seed=1)  # by nothing
    fourth = second[:, ::-1]
    routing = TokenRouting(np.stack([first, second, third, fourth]), np.arange(400) // 10)
    layers = routing_statistics(routing, EXPERTS)
    assert layers[1].transition[0] == 1
    assert layers[3].transition[1] == 1
    assert layers[3].transition[2] == 1
    assert layers[0].transition == (None, None, None, None)
    assert layers[2].transition[2:] == (None, None)
    for guess in (layers[2].transition[0], layers[3].transition[0], layers[1].frequency):
        assert guess == pytest.approx(2 / EXPERTS, abs=0.1)


def test_a_single_document_is_halved_and_nothing_says_nothing() -> None:
    ids = [[0, 1]] * 10 + [[0, 2]] * 10
    (layer,) = routing_statistics(routing_of([ids], [0] * 20), EXPERTS)
    assert layer.frequency == 0.5
    (empty,) = routing_statistics(TokenRouting(np.zeros((1, 0, 2), np.uint16), np.zeros(0, np.int64)), EXPERTS)
    assert {empty.entropy, empty.overlap, empty.chance_overlap, empty.frequency, *empty.transition} == {None}
    assert mean([None, None]) is None
    assert mean([None, 1.0, 2.0]) == 1.5


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, EXPERTS - 1), unique=True, max_size=4).map(tuple)), max_size=30
    ),
    num_slots=st.integers(1, EXPERTS),
)
def test_reuse_distances_give_the_hit_rate_of_lru(steps: list[tuple[bool, tuple[int, ...]]], num_slots: int) -> None:
    hits, accesses = {True: 0, False: 0}, {True: 0, False: 0}
    slots: list[int] = []
    for is_prefill, experts in steps:
        for expert in experts:
            accesses[is_prefill] += 1
            if expert in slots:
                hits[is_prefill] += 1
                slots.remove(expert)
            slots.append(expert)
            del slots[:-num_slots]
    prefill, decode = reuse_distances(steps, EXPERTS)
    for is_prefill, histogram in ((True, prefill), (False, decode)):
        expected = hits[is_prefill] / accesses[is_prefill] if accesses[is_prefill] else None
        rate = lru_hit_rate(histogram, num_slots)
        assert rate == expected or (rate is not None and expected is not None and math.isclose(rate, expected))


def test_a_run_becomes_tables_of_tokens() -> None:
    run = MadeUpRun()
    collector = RoutingCollector(run.num_layers)
    collector.add_all(run.events())
    prefill, decode = collector.routing(run.experts_per_token)
    assert prefill.topk_ids_LNK.shape == (3, 10, 2)
    assert decode.topk_ids_LNK.shape == (3, 12, 2)
    assert prefill.request_N.tolist() == [0] * 5 + [1] * 5
    layers = [event for event in run.events() if isinstance(event, LayerEvent)]
    for layer in range(run.num_layers):
        rows = [e.topk_ids_TK for e in layers if e.layer == layer and len(e.topk_ids_TK) == 1]
        assert decode.topk_ids_LNK[layer].tolist() == np.concatenate(rows).tolist()
    totals = (collector.prefill_totals, collector.decode_totals)
    assert [total.steps for total in totals] == [2, 12]
    assert sum(total.hits + total.misses for total in totals) == sum(len(e.hits) + len(e.misses) for e in layers)
    assert sum(total.stall_s for total in totals) == pytest.approx(sum(e.stall_s for e in layers))
    assert collector.end_s == layers[-1].end_s
    assert collector.num_requests == 2


def test_steps_of_both_phases_are_taken_apart_and_half_steps_left_out() -> None:
    ids_TK = np.arange(8, dtype=np.uint16).reshape(4, 2)  # the last row is padding
    layers: list[TraceEvent] = [LayerEvent(0, 1, 1, layer, ids_TK, (0,), (1,), (1,), 0.5) for layer in range(2)]
    spans = (StepSpan("a", 1, False), StepSpan("b", 2, True))
    collector = RoutingCollector(2)
    collector.add_all(layers)  # before any step
    collector.add_all([StepEvent(0, 1, spans), *layers, StepEvent(1, 2, spans), layers[0], StepEvent(2, 3, ())])
    prefill, decode = collector.routing(2)
    assert decode.topk_ids_LNK.tolist() == [[[0, 1]]] * 2
    assert prefill.topk_ids_LNK.tolist() == [[[2, 3], [4, 5]]] * 2
    assert (collector.prefill_totals.steps, collector.prefill_totals.late) == (2, 3)
    assert collector.decode_totals.hit_rate is None
