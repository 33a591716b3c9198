"""Forecasts keep to what is known without them: more slots, a faster link or a predictor never make it slower."""

import pytest

from compute_node.planning.compute_cost import ComputeCost
from compute_node.planning.forecast import CostBand, Forecaster, ladder
from compute_node.planning.made_up_run import (
    LEAST_STEPS,
    MOST_STEPS,
    PROMPT_TOKENS,
    Conversation,
    distinct_experts,
    of_this_model,
    with_cost,
)
from compute_node.replay.recorded_run import RecordedRun
from compute_node.schedule import POLICIES
from compute_node.step_ledger import Phase
from promoe.config import SettingUnfit
from promoe.model_spec import Dtype
from tests.compute_node.planning.plans import small_footprint, small_spec
from tests.compute_node.replay.virtual_runs import made_up
from tests.promoe.traces import MadeUpRun

SPEC = small_spec()
BLOB_NBYTES = SPEC.layout.blob_nbytes
LOW = ComputeCost(num_layers=4, dense_nbytes=4_000_000, blob_nbytes=BLOB_NBYTES, kv_nbytes=0, bytes_per_s=1e9)
HIGH = ComputeCost(
    num_layers=4, dense_nbytes=4_000_000, blob_nbytes=BLOB_NBYTES, kv_nbytes=1_000_000, bytes_per_s=1e9, layer_s=1e-3
)


@pytest.fixture(scope="module")
def run() -> RecordedRun:
    return Conversation.of(SPEC, 1).run(SPEC)


def forecaster(run: RecordedRun, link_bytes_per_s: float) -> Forecaster:
    return Forecaster(run, POLICIES["proactive"], link_bytes_per_s, CostBand(LOW, HIGH))


def test_a_step_costs_its_bytes_and_every_layers_own() -> None:
    assert LOW.lead_s == pytest.approx(1e-3)
    assert LOW.step_s(2) == pytest.approx(4 * (1e-3 + LOW.experts_s(2)))
    assert HIGH.step_s(0) == pytest.approx(4 * (1e-3 + 1e-3 + 0.25e-3))
    scaled = HIGH.scaled_to(0.5, 2)
    assert scaled.step_s(2) == pytest.approx(0.5)
    assert scaled.lead_s / scaled.experts_s(2) == pytest.approx(HIGH.lead_s / HIGH.experts_s(2))


def test_a_conversation_is_a_prefill_and_then_tokens(run: RecordedRun) -> None:
    first, *others = run.steps
    assert (first.phase, first.start.num_tokens) == (Phase.PREFILL, PROMPT_TOKENS)
    assert len(others) == MOST_STEPS
    assert all(step.phase is Phase.DECODE and step.start.num_tokens == 1 for step in others)
    assert all(len(layer.needed) == 2 for step in others for layer in step.layers)
    assert distinct_experts(run) == 2
    three = Conversation.of(SPEC, 3).run(SPEC)
    assert 2 < distinct_experts(three) <= 6
    assert LEAST_STEPS <= len(three.steps) - 1 <= MOST_STEPS


def test_compute_takes_what_the_cost_says(run: RecordedRun) -> None:
    assert all(step.compute_s == pytest.approx(LOW.step_s(2)) for step in with_cost(run, LOW).steps[1:])


def test_the_band_has_its_ends_in_order_and_more_slots_help(run: RecordedRun) -> None:
    rows = [forecaster(run, 50e6).at(slots) for slots in (1, 4, 8)]
    for row in rows:
        assert LOW.step_s(2) <= row.tpot_low_s * 1.0001
        assert row.tpot_low_s < row.tpot_high_s
        assert 0 <= row.hit_rate_low <= 1
    assert rows[0].tpot_high_s > rows[1].tpot_high_s > rows[2].tpot_high_s
    assert rows[2].hit_rate_low == 1.0
    assert rows[2].tpot_low_s == pytest.approx(LOW.step_s(2))


def test_a_faster_link_brings_it_to_all_resident(run: RecordedRun) -> None:
    slow, fast, endless = (forecaster(run, rate).at(4) for rate in (20e6, 200e6, 1e15))
    assert slow.tpot_high_s > fast.tpot_high_s > endless.tpot_high_s
    assert endless.tpot_high_s == pytest.approx(HIGH.step_s(2), rel=1e-3)
    # What the link carries bounds it from below: the misses' bytes.
    least_nbytes = (1 - slow.hit_rate_high) * 8 * BLOB_NBYTES
    assert slow.tpot_low_s >= 0.9 * least_nbytes / 20e6


def test_quarters_and_the_plan_are_looked_at() -> None:
    assert ladder(8, (5,)) == [2, 4, 5, 6, 8]
    assert ladder(128, (42,)) == [32, 42, 64, 96, 128]
    assert ladder(2, (1,)) == [1, 2]


def test_a_recorded_routing_must_be_the_models() -> None:
    recorded = made_up(MadeUpRun(num_layers=4, num_experts=8, experts_per_token=2))
    mine = of_this_model(recorded, SPEC)
    assert mine.geometry.blob_nbytes == BLOB_NBYTES
    assert (mine.header.resident, len(mine.steps)) == ((), len(recorded.steps))
    assert forecaster(mine, 50e6).at(2).tpot_high_s > HIGH.step_s(2)
    with pytest.raises(SettingUnfit, match=r"3 MoE layers, 8 experts and 2 per token; small has 4, 8 and 2"):
        of_this_model(made_up(MadeUpRun()), SPEC)


def test_the_footprint_of_these_tests_is_consistent() -> None:
    assert small_footprint(Dtype.FLOAT32).spec.experts_nbytes == 2 * small_footprint().spec.experts_nbytes
