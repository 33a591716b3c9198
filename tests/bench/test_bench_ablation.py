"""The ablation's arithmetic on figures made by hand; the measuring itself is the benchmark."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from compute_node.replay.belady import HitCount, PhaseHits, Visit
from tests.bench.ablation_plot import plot_ablation
from tests.bench.ablation_table import AblationGroup, Limits, Measured, make_group, print_group
from tests.bench.ablation_variants import BASE, OURS, PROMOE, variants
from tests.bench.bench_ablation import Effort, Reference, efforts_asked, prompts_of
from tests.bench.greedy_chat import ChatRun
from tests.bench.optimum import optimum_of
from tests.bench.side_by_side import ChatFigures, PhaseFigures
from tests.promoe.specs import small_spec

BLOB_NBYTES = 1000


def chat(tpot_s: float, prefill_s: float, hits: int, misses: int) -> ChatFigures:
    """Two decode steps of one length; prefill asks for the same as both of them."""
    figures = PhaseFigures(hits, misses, 0.2 * tpot_s, 0.1 * tpot_s, {"demand": misses * BLOB_NBYTES, "prefetch": 500})
    return ChatFigures(ChatRun((1, 2, 3), prefill_s, (tpot_s, tpot_s)), figures, figures)


@pytest.fixture
def group() -> AblationGroup:
    limits = Limits(
        resident=[chat(0.1, 0.4, 20, 0), chat(0.1, 0.4, 20, 0), chat(0.3, 0.4, 20, 0)],
        optimum=PhaseHits(HitCount(10, 10), HitCount(15, 5)),
        layer_optimum=PhaseHits(HitCount(9, 11), HitCount(12, 8)),
        link_bytes_per_s=12_500,
        blob_nbytes=BLOB_NBYTES,
    )
    lru = [chat(0.6, 2.0, 10, 10), chat(0.6, 2.0, 10, 10), chat(1.2, 4.0, 10, 10)]
    ours = [chat(0.3, 1.0, 18, 2), chat(0.3, 1.0, 18, 2), chat(0.6, 2.0, 18, 2)]
    return make_group(2.0, 0.5, {BASE: Measured(lru, None), OURS: Measured(ours, 0.7)}, limits)


def test_floors_are_compute_or_the_optimums_bytes(group: AblationGroup) -> None:
    assert group["all_resident_tpot_s"] == 0.1
    assert group["floor_tpot_s"] == pytest.approx(10 * 0.25 * BLOB_NBYTES / 12_500)  # 10 accesses a token
    assert group["floor_prefill_s"] == pytest.approx(20 * 0.5 * BLOB_NBYTES / 12_500)
    assert (group["belady_decode_hit_rate"], group["belady_decode_hit_rate_per_layer"]) == (0.75, 0.6)


def test_a_row_is_compared_with_the_floor_and_with_lru(group: AblationGroup) -> None:
    lru, ours = group["rows"]
    assert (lru["speedup_over_lru"], ours["speedup_over_lru"], ours["prefill_speedup_over_lru"]) == (1.0, 2.0, 2.0)
    assert lru["tpot_over_floor"] == pytest.approx(0.6 / 0.2)
    assert ours["prefill_over_floor"] == pytest.approx(1.0 / 0.8)
    assert ours["decode"]["hit_rate"] == 0.9
    assert ours["decode"]["bytes_by_reason"] == {"demand": 1000.0, "prefetch": 250.0}
    assert ours["prefill"]["bytes_by_reason"] == {"demand": 2000.0, "prefetch": 500.0}
    assert ours["decode"]["stall_share"] == pytest.approx(0.1)
    assert ours["decode"]["late_prefetch_stall_share"] == pytest.approx(0.05)
    assert (lru["good_pred"], ours["good_pred"]) == (None, 0.7)


def test_the_table_has_a_line_for_every_row_and_limit(group: AblationGroup, capsys: pytest.CaptureFixture[str]) -> None:
    print_group(group)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 + 2
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].split(" | ")[1:4] == ["300.0", "1.50", "2.00"]


def test_the_plot_is_drawn_from_the_json(group: AblationGroup, tmp_path: Path) -> None:
    other = {**group, "cache_rate": 0.25}
    report = tmp_path / "ablation.json"
    report.write_text(json.dumps({"cpu": "a CPU", "groups": [other, group, {**group, "link_share": 6.0}]}))
    plot_ablation(report, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"


def test_each_step_changes_something_and_the_last_of_each_part_is_the_named_policy() -> None:
    steps = variants()
    assert [steps[0].name, steps[4].name, steps[-1].name] == [BASE, PROMOE, OURS]
    assert [steps[0].policy.name, steps[4].policy.name, steps[-1].policy.name] == ["lru", "promoe", "proactive"]
    for before, after in itertools.pairwise(steps):
        assert replace(after.policy, name="") != replace(before.policy, name=""), after.name


def test_the_shared_optimum_is_no_worse_than_equal_slots() -> None:
    spec = small_spec(3, 6)
    drawn = random.Random(3)
    experts = range(spec.num_experts)
    routing = [
        [Visit(frozenset(drawn.sample(experts, 2)), step % 5 != 0) for step in range(60)]
        for _ in range(spec.num_moe_layers)
    ]
    for slots in (1, 2, spec.num_experts):
        shared, per_layer = optimum_of(routing, spec, slots)
        hits = [optimum.prefill.hits + optimum.decode.hits for optimum in (shared, per_layer)]
        assert hits[0] >= hits[1]
        accesses = sum(len(visit.experts) for layer in routing for visit in layer)
        assert hits[0] + shared.prefill.misses + shared.decode.misses == accesses
        assert slots < spec.num_experts or hits == [accesses, accesses], "everything is resident from the start"


def test_another_token_ends_the_run() -> None:
    reference = Reference({"Why?": (1, 2, 3, 4)}, [], 0.1)
    reference.check("LRU", "Why?", chat(0.1, 0.1, 1, 0))
    with pytest.raises(AssertionError, match="ours answers 'Why\\?' otherwise"):
        Reference({"Why?": (1, 9, 3)}, [], 0.1).check("ours", "Why?", chat(0.1, 0.1, 1, 0))


def test_further_links_get_less_effort() -> None:
    (first, further), options = efforts_asked(["--links", "2,6", "--rounds", "7", "--tokens", "20"])
    assert first == Effort(2.0, (0.125, 0.25, 0.375, 0.5, 0.75, 1.0), 7, 20)
    assert further == Effort(6.0, (0.25, 0.5, 0.75), 3, 10)
    assert options.threads == 1
    (only,), _ = efforts_asked(["--links", "6", "--rates", "0.25,0.5"])
    assert (only.link_share, only.cache_rates, only.rounds) == (6.0, (0.25, 0.5), 5)
    assert len(set(prompts_of(7))) == 7
