"""The ablation for GPUs runs anywhere; its routing, its hints and its rows are what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compute_node.device.cpu import CpuDevice
from compute_node.planning.made_up_routing import RoutingGeometry, RoutingLaw, structured_routing
from compute_node.step_ledger import StepLedger
from promoe.hint import Observation, StepSpan, StepStart
from tests.bench.bench_gpu_ablation import Effort, gpu_policies, measure
from tests.bench.decode_loop import recorded_routing
from tests.bench.greedy_chat import run_chat
from tests.bench.link_rates import LinkSettings
from tests.bench.noisy_oracle import RECALLS, NoisyOracle, noisy_ranking, scores_of
from tests.bench.random_moe import SHAPES, build_model
from tests.bench.structured_routing import RoutedConversation, RoutingOverride

SHAPE = replace(SHAPES["tiny"], num_layers=4, num_experts=8)
GEOMETRY = RoutingGeometry(4, 8, 2)


def conversations(num: int, num_prompt: int, num_tokens: int) -> tuple[RoutedConversation, ...]:
    law = RoutingLaw(0.4, 0.35)
    prompt = tuple(range(1, num_prompt + 1))
    return tuple(
        RoutedConversation(prompt, structured_routing(GEOMETRY, law, num_prompt + num_tokens, seed))
        for seed in range(num)
    )


def test_a_model_is_routed_as_the_conversation_says() -> None:
    loaded = build_model(SHAPE, torch.device("cpu"))
    talks = conversations(2, 5, 3)
    override = RoutingOverride(loaded.experts_modules, talks, torch.device("cpu"))
    with override.installed(), recorded_routing(loaded.experts_modules) as steps:
        for number in (0, 1, 1):
            override.number = number
            run_chat(loaded.model, StepLedger(), list(talks[number].prompt), 4)
    for layer, visits in enumerate(steps):
        assert visits == [visit for number in (0, 1, 1) for visit in talks[number].visits(layer)]
    with recorded_routing(loaded.experts_modules) as steps:
        run_chat(loaded.model, StepLedger(), list(talks[0].prompt), 4)
    assert steps[0] != talks[0].visits(0), "the routers are asked again"


@pytest.mark.parametrize("recall", RECALLS.values())
def test_hints_are_right_as_often_as_their_scores_say(recall: float) -> None:
    generator = np.random.default_rng(5)
    scores_N = scores_of(recall, 6)
    assert (np.diff(scores_N) <= 0).all()
    right_N = np.zeros(len(scores_N))
    rounds = 2000
    for _ in range(rounds):
        routed_K = generator.choice(64, 6, replace=False)
        ranking_N = noisy_ranking(routed_K, 64, scores_N, generator)
        assert len(set(ranking_N.tolist())) == 12
        right_N += np.isin(ranking_N, routed_K)
    assert right_N / rounds == pytest.approx(scores_N, abs=0.04)
    assert right_N[:6].sum() / (6 * rounds) == pytest.approx(recall, abs=0.01)


def test_the_oracle_follows_a_session_through_its_conversations() -> None:
    talks = conversations(2, 3, 2)
    oracle = NoisyOracle(talks, GEOMETRY.num_experts)
    session = oracle.open_session()
    step = 0
    for number, talk in enumerate(talks):
        for token in (2, 3, 4):  # of the last prompt token, then of the answer's
            step += 1
            session.begin_step(StepStart(step, (StepSpan("r", 3 if token == 2 else 1, token == 2),)))
            for layer in range(GEOMETRY.num_layers + 1):
                for hint in session.observe(Observation(step, layer, (0,), 1)):
                    is_next = hint.step == step + 1
                    assert is_next == (layer == GEOMETRY.num_layers)
                    assert token + is_next < len(talk.ids_TLK), "nothing is said of what is not asked"
                    key = 0 if is_next else hint.layer - layer
                    expected = oracle.rankings[number][token + is_next, hint.layer, key]
                    assert hint.experts.tolist() == expected.tolist()
                    assert (is_next and hint.layer < max(RECALLS)) or key in RECALLS
                    assert token > 2 or is_next, "it is silent about prompts"


def test_every_policy_is_measured_beside_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.link_rates.PEAK_NBYTES", 1 << 20)
    effort = Effort((0.5,), rounds=2, num_prompt=6, num_tokens=5, hint_latency_s=1e-4)
    blob_nbytes = SHAPE.spec().layout.blob_nbytes
    saved: list[str] = []
    measured = measure(SHAPE, CpuDevice(), effort, tmp_path, lambda report: saved.append(json.dumps(report)))
    written = json.loads(json.dumps(measured))
    assert json.loads(saved[-1]) == written
    assert json.loads(saved[0]) == {name: value for name, value in written.items() if name != "timeline"}
    (group,) = written["groups"]
    rows = {row["variant"]: row for row in group["rows"]}
    assert list(rows) == list(gpu_policies(LinkSettings(1 << 20, 2)))
    assert group["slots_per_layer"] == 4
    assert group["same_tokens"]
    for name, row in rows.items():
        assert len(row["tpot_s"]["values"]) == 2
        assert row["tpot_over_floor"] > 0
        assert 0 <= row["decode"]["hit_rate"] <= 1
        is_hinted = name in {"ProMoE", "promoe", "promoe, burst's chunks"}
        assert (row["good_pred"] is not None) == is_hinted
        assert bool(group["hint_fates"][name]) == is_hinted
        assert group["links"][name]["busy_bytes_per_s"] > 0
    misses_per_token = (1 - rows["LRU"]["decode"]["hit_rate"]) * SHAPE.num_layers * SHAPE.experts_per_token
    moved = rows["LRU"]["decode"]["bytes_by_reason"]
    assert moved == {"demand": pytest.approx(misses_per_token * blob_nbytes), "prefetch": 0, "stream": 0}
    assert written["policies"]["LRU"]["chunk_nbytes"] is None
    assert "structured" in written["routing"]["kind"]
    drawn = json.loads((tmp_path / written["timeline"]["drawn_as_a_trace"]).read_text())
    assert {"X", "M"} <= {event["ph"] for event in drawn["traceEvents"]}
    assert (tmp_path / written["timeline"]["seen_by_the_device"]).stat().st_size > 0
