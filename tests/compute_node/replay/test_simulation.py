"""The expert cache in virtual time: counted against a dozen lines of LRU, and times against what must hold."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.clocked_transfers import LinkModel
from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.limits import limits_of
from compute_node.replay.phase_totals import recorded_totals
from compute_node.replay.recorded_run import RecordedRun
from compute_node.replay.simulation import Simulation, WhatIf, starting_snapshot
from compute_node.schedule import POLICIES, SlotSplit
from compute_node.slots import CacheGeometry
from compute_node.step_ledger import Phase
from tests.compute_node.replay.virtual_runs import LINK, TracedSimulation, made_up, what_if
from tests.promoe.traces import MadeUpRun

NO_HINTS = HintSettings(HintSource.NONE)


def lru_misses(run: RecordedRun, slots: int) -> int:
    """Layer by layer, each list from what was used longest ago; within a visit, what is there is used first."""
    layers: list[list[int]] = [[] for _ in range(run.geometry.num_layers)]
    misses = 0
    for step in run.steps:
        for turn in step.layers:
            held = layers[turn.event.layer]
            missing = [expert for expert in turn.needed if expert not in held]
            misses += len(missing)
            used = [expert for expert in turn.needed if expert in held] + missing
            idle = [expert for expert in held if expert not in used]
            layers[turn.event.layer] = (idle + used)[-slots:]
    return misses


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.integers(2, 8))
def test_lru_in_the_simulation_is_lru(seed: int, slots: int) -> None:
    run = made_up(MadeUpRun(seed=seed, prompt_tokens=1, slots_per_layer=slots))
    outcome = Simulation(run, what_if("lru", slots, NO_HINTS)).run()
    assert sum(totals.misses for totals in outcome.phases.values()) == lru_misses(run, slots)


def test_reactive_lru_waits_for_every_miss_and_for_nothing_else() -> None:
    run = made_up(MadeUpRun(prompt_tokens=1))
    outcome = Simulation(run, what_if("lru", 4, NO_HINTS)).run()
    for phase, totals in outcome.phases.items():
        compute_s = sum(step.compute_s for step in run.steps if step.phase is phase)
        assert totals.nbytes == totals.misses * run.geometry.blob_nbytes
        assert totals.stall_s == pytest.approx(totals.nbytes / LINK.bytes_per_s)
        assert totals.time_s == pytest.approx(compute_s + totals.stall_s)


def test_a_recorded_run_is_replayed_in_its_own_time() -> None:
    """With the same policy, link and hints the simulation is the run; a node's own noise is left out here."""
    run = made_up(MadeUpRun(num_layers=4, decode_steps=20))
    for policy in POLICIES:
        traced = TracedSimulation(run, what_if(policy, 3))
        recorded = traced.recorded()
        again = Simulation(recorded, replace(what_if(policy, 3), hints=HintSettings())).run()
        before = recorded_totals(recorded)
        for phase in Phase:
            assert again.phases[phase].hits == pytest.approx(before[phase].hits, rel=0.02)
            assert again.phases[phase].time_s == pytest.approx(before[phase].time_s, rel=0.02)
            assert again.phases[phase].num_tokens == before[phase].num_tokens
            assert before[phase].nbytes == pytest.approx(traced.outcome.phases[phase].nbytes, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 8),
    seed=st.integers(0, 100),
    link=st.floats(1e5, 1e9),
    source=st.sampled_from(HintSource),
)
def test_nothing_beats_its_limits(policy: str, slots: int, seed: int, link: float, source: HintSource) -> None:
    run = made_up(MadeUpRun(num_layers=4, seed=seed, decode_steps=8))
    outcome = Simulation(run, WhatIf(POLICIES[policy], slots, LinkModel(link), HintSettings(source))).run()
    limits = limits_of(run, slots, link)
    for phase, totals in outcome.phases.items():
        assert totals.time_s >= limits[phase].all_resident_s * (1 - 1e-9)
        assert totals.time_s == pytest.approx(limits[phase].all_resident_s + totals.stall_s)
        assert totals.late <= totals.misses
    assert sum(t.hits + t.misses for t in outcome.phases.values()) == run.num_accesses
    moved_nbytes = sum(totals.nbytes for totals in outcome.phases.values())
    assert moved_nbytes >= sum(limit.least_nbytes for limit in limits.values()), "Belady moves the least"
    floor_s = sum(limit.least_nbytes for limit in limits.values()) / link
    assert sum(totals.time_s for totals in outcome.phases.values()) >= floor_s * (1 - 1e-9)


def test_a_perfect_predictor_ahead_of_a_fast_link_leaves_no_stall() -> None:
    run = made_up(MadeUpRun(num_layers=6, decode_steps=30))
    fast = replace(what_if("promoe", 4), link=LinkModel(1e9))
    decode = Simulation(run, fast).run().phases[Phase.DECODE]
    reactive = Simulation(run, replace(fast, hints=NO_HINTS)).run().phases[Phase.DECODE]
    assert decode.hit_rate > 0.9 > reactive.hit_rate
    assert decode.stall_s < 0.1 * reactive.stall_s


def test_hints_that_come_too_late_help_nobody() -> None:
    run = made_up(MadeUpRun(num_layers=4, decode_steps=20))
    late = what_if("promoe", 3, HintSettings(HintSource.ORACLE, lookahead=1, latency_s=10.0))
    none = what_if("promoe", 3, NO_HINTS)
    assert Simulation(run, late).run().phases == Simulation(run, none).run().phases


def geometry(slots: int) -> CacheGeometry:
    return CacheGeometry(2, 4, slots, 100, 1)


@pytest.mark.parametrize(
    ("resident", "slots", "split", "expected"),
    [
        ((0, 3, 4, -1), 2, SlotSplit.LAYER, [0, 3, 4, -1]),
        ((0, 3, 1, 4), 2, SlotSplit.GLOBAL, [0, 3, 1, 4]),
        ((0, 3, 1, 4), 2, SlotSplit.LAYER, [0, 3, 4, 5]),
        ((0, 3, 4, -1), 3, SlotSplit.LAYER, [0, 3, 1, 4, 5, 6]),
        ((3, 2, 7, 5), 1, SlotSplit.LAYER, [3, 7]),
    ],
)
def test_a_replay_starts_with_what_was_resident_as_far_as_it_fits(
    resident: tuple[int, ...], slots: int, split: SlotSplit, expected: list[int]
) -> None:
    run = made_up(MadeUpRun(num_layers=2, num_experts=4))
    run = replace(run, header=replace(run.header, resident=resident))
    assert starting_snapshot(run, geometry(slots), split).resident == expected
