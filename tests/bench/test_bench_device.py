"""The device benchmark runs anywhere; its figures agree with each other and with the offline optimum."""

import ctypes
import json
from dataclasses import replace

import pytest
import torch

from compute_node.device.cpu import CpuDevice
from promoe.ids import ExpertId
from tests.bench.bench_device import Length, measure, row_line
from tests.bench.decode_loop import decode, recorded_routing, zipf_conversation
from tests.bench.link_rates import BurstRow, LinkSettings, gentlest_within
from tests.bench.random_moe import SHAPES, build_model, open_arena
from tests.bench.report import Sample

SHAPE = replace(SHAPES["tiny"], num_layers=2, num_experts=8)


def test_rows_agree_with_themselves_and_with_the_optimum() -> None:
    spec = SHAPE.spec()
    measured = measure(SHAPE, CpuDevice(), (0.25, 1.0), Length(2, 8, 6, 2), LinkSettings(1 << 14, 2))
    assert json.loads(json.dumps(measured)) == measured | {"rows": json.loads(json.dumps(measured["rows"]))}
    rows = measured["rows"]
    assert isinstance(rows, list)
    small, whole = rows
    assert (small["slots_per_layer"], whole["slots_per_layer"]) == (2, 8)
    assert (whole["hit_rate"], whole["bytes_per_token"], whole["stall_s_per_token"]) == (1.0, 0.0, 0.0)
    accesses = 2 * 6 * SHAPE.num_layers * SHAPE.experts_per_token
    for row in rows:
        assert row["hits"] + row["misses"] == accesses, "each token of each round needs its experts in each layer"
        assert row["bytes_per_token"] == row["misses"] * spec.layout.blob_nbytes / 12
        assert row["floor_tpot_s"] >= row["all_resident_tpot_s"]["median"]
        assert row["host_wait_s_per_token"] == row["stall_s_per_token"], "on the CPU the host waits"
        assert f"cache rate {row['cache_rate']}" in row_line(row)
    assert small["hit_rate"] <= small["belady_hit_rate"] < whole["belady_hit_rate"] == 1.0
    offload = measured["accelerate_cpu_offload"]
    assert isinstance(offload, dict)
    assert len(offload["tpot_s"]["values"]) == 2


def test_the_arena_holds_the_models_own_experts() -> None:
    spec = SHAPE.spec()
    loaded = build_model(SHAPE, torch.device("cpu"))
    with open_arena(loaded, spec, CpuDevice()) as arena:
        for expert in (ExpertId(0, 0), ExpertId(1, 3), ExpertId(SHAPE.num_layers - 1, SHAPE.num_experts - 1)):
            blob = ctypes.string_at(arena.address_of(expert), spec.layout.blob_nbytes)
            for part in spec.layout.tensors:
                parameter = loaded.experts_modules[expert.layer].get_parameter(part.name)[expert.expert]
                expected = parameter.contiguous().view(torch.uint8).numpy().tobytes()
                assert blob[part.offset : part.offset + part.nbytes] == expected


def test_routing_is_recorded_step_by_step() -> None:
    loaded = build_model(SHAPE, torch.device("cpu"))
    conversation = zipf_conversation(1, SHAPE.vocab_size, 5, 3)
    with recorded_routing(loaded.experts_modules) as steps:
        timing = decode(loaded.model, conversation)
    decode(loaded.model, conversation)  # no longer recorded
    assert len(timing.token_s) == 3
    assert [[step.is_decode for step in layer] for layer in steps] == [[False, True, True, True]] * SHAPE.num_layers
    assert all(len(step.experts) == SHAPE.experts_per_token for layer in steps for step in layer if step.is_decode)


def test_conversations_repeat_their_frequent_tokens_and_themselves() -> None:
    conversation = zipf_conversation(3, 1000, 300, 100)
    assert conversation == zipf_conversation(3, 1000, 300, 100)
    assert conversation != zipf_conversation(4, 1000, 300, 100)
    ids = conversation.prompt + conversation.answer
    assert len(ids) == 400
    assert sum(token < 10 for token in ids) > 100 > sum(500 <= token < 510 for token in ids)


@pytest.mark.parametrize(("share", "chunk_nbytes"), [(0.9, 1), (0.99, 4), (1.0, 8)])
def test_of_good_settings_the_one_with_the_fewest_bytes_in_flight_is_taken(share: float, chunk_nbytes: int) -> None:
    rates = {1: 92.0, 4: 99.5, 8: 100.0}
    rows = [
        BurstRow(LinkSettings(chunk, flight), Sample((1.0,)), Sample((rate,)))
        for chunk, rate in rates.items()
        for flight in (4, 2)
    ]
    assert gentlest_within(rows, share) == LinkSettings(chunk_nbytes, 2)
