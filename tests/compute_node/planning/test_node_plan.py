"""The node's planner: the plan is the node's own, rates say where they come from, wrong wishes end with a sentence."""

import json

import pytest
import torch

from compute_node.config import DeviceChoice
from compute_node.device import cpu
from compute_node.device.cpu import CpuDevice
from compute_node.memory_plan import MemoryNeeds, plan_memory
from compute_node.planning.__main__ import main
from compute_node.planning.node_plan import NodePlanner
from compute_node.planning.options import parse_options
from compute_node.planning.planned_device import CONTEXT_NBYTES, AskedDevice, PlannedDevice
from compute_node.planning.rates import ASSUMED_LINK_BYTES_PER_S, link_rate, memory_rate
from promoe.config import SettingUnfit
from promoe.host_memory import CGROUP_LIMIT, HostMemory
from tests.compute_node.planning.plans import DENSE_NBYTES, MIB, config, small_footprint

FOOTPRINT = json.dumps(small_footprint().as_document())
SETTINGS = ("--set", "compute.pack=p", "--set", "compute.store_endpoint=unix:s")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main([*SETTINGS, *arguments], FOOTPRINT) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_a_gpu_elsewhere_is_planned_as_a_node_on_it_would(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_nbytes = CONTEXT_NBYTES + 70 * MIB
    plan = planned(capsys, "--gpu-memory", str(gpu_nbytes), "--link", "1e9", "--set", "compute.cache_rate=0.5")
    footprint, asked = small_footprint(), config(cache_rate=0.5)
    kv_nbytes_per_token = 2 * 4 * 2 * 32 * 2
    rows_nbytes = 512 * 256 * 2 * (16 + 2 * 2) + 8 * 1000 * 16
    needs = MemoryNeeds(DENSE_NBYTES, kv_nbytes_per_token, rows_nbytes)
    expected = plan_memory(asked, footprint.spec, needs, 70 * MIB - DENSE_NBYTES)
    memory_plan = plan["memory_plan"]
    assert isinstance(memory_plan, dict)
    assert memory_plan["slots_per_layer"] == expected.slots_per_layer == 4
    assert memory_plan["kv_nbytes"] == expected.kv_nbytes
    assert (plan["fits"], plan["suggested_slots"]) == (True, 4)
    forecast = plan["forecast"]
    assert isinstance(forecast, dict)
    assert [row["slots_per_layer"] for row in forecast["rows"]] == [2, 4, 6, 8]
    assert forecast["link"] == {"bytes_per_s": 1e9, "source": "given"}
    assert "assumed" in forecast["memory_bandwidth"]["source"]


def test_what_does_not_fit_still_has_a_suggestion_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    short = planned(capsys, "--gpu-memory", str(CONTEXT_NBYTES + 64 * MIB), "--set", "compute.cache_rate=1.0")
    assert not short["fits"]
    assert short["mends"]
    none = planned(capsys, "--gpu-memory", str(CONTEXT_NBYTES + 30 * MIB))
    assert (none["fits"], none["suggested_slots"], none["forecast"]) == (False, None, None)


def test_a_measured_tpot_replaces_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = ("--gpu-memory", str(CONTEXT_NBYTES + 200 * MIB), "--requests", "2")
    forecast = planned(capsys, *gpu, "--resident-tpot", "0.25")["forecast"]
    assert isinstance(forecast, dict)
    assert forecast["all_resident_s"] == [pytest.approx(0.25), pytest.approx(0.25)]
    assert (forecast["is_resident_given"], forecast["num_requests"]) == (True, 2)


def test_wrong_wishes_end_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SETTINGS, "--set", "compute.cache_rate=7"], FOOTPRINT) == 2
    assert "compute.cache_rate is 7" in capsys.readouterr().err
    assert main([*SETTINGS, "--set", "compute.expert_slots=99", "--gpu-memory", "9e9"], FOOTPRINT) == 2
    assert "allowed: 1 to 8" in capsys.readouterr().err
    assert main([*SETTINGS], "{}") == 1
    assert "not a model's footprint" in capsys.readouterr().err
    assert main([*SETTINGS, "--gpu-memory", "9e9", "--trace", "no such trace"], FOOTPRINT) == 1
    assert "There is no trace" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        parse_options(["--link", "-3"])
    assert end.value.code == 2


def test_on_a_cpu_the_arena_is_in_the_same_memory() -> None:
    footprint = small_footprint()
    given = AskedDevice(host_nbytes=1 << 30)
    device = PlannedDevice.of(config(device=DeviceChoice.CPU), footprint, given)
    assert (device.kind, device.free_nbytes) == ("cpu", (1 << 30) - footprint.arena_nbytes)
    here = PlannedDevice.of(config(device=DeviceChoice.CPU), footprint, AskedDevice())
    assert 0 < here.free_nbytes < CpuDevice().memory().total_nbytes
    with pytest.raises(SettingUnfit, match="--gpu-memory plans for a GPU"):
        PlannedDevice.of(config(device=DeviceChoice.CPU), footprint, AskedDevice(gpu_nbytes=1 << 30))


def test_in_a_container_its_limit_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = HostMemory(1 << 30, 2 << 30, CGROUP_LIMIT, has_cgroup_limit=True)
    monkeypatch.setattr(cpu, "host_memory", lambda: bound)
    footprint = small_footprint()
    device = PlannedDevice.of(config(device=DeviceChoice.CPU), footprint, AskedDevice())
    assert device.free_nbytes == (1 << 30) - footprint.arena_nbytes
    # The node's own plan goes by the same number.
    memory = CpuDevice().memory()
    assert (memory.free_nbytes, memory.total_nbytes) == (1 << 30, 2 << 30)


def test_rates_say_where_they_come_from() -> None:
    elsewhere = PlannedDevice("cuda", "a GPU", 1 << 30, None)
    here = PlannedDevice("cpu", "the CPU", 1 << 30, CpuDevice())
    assert link_rate(elsewhere, 3.0, 2.0).bytes_per_s == 3.0
    assert link_rate(here, None, 2.0).source == "compute.link_bytes_per_s"
    assert link_rate(elsewhere, None, None).bytes_per_s == ASSUMED_LINK_BYTES_PER_S
    assert memory_rate(elsewhere, 5.0).source == "given"
    for rate in (link_rate(here, None, None), memory_rate(here, None)):
        assert rate.bytes_per_s > 1e7
        assert rate.source.startswith("measured")
    if torch.cuda.is_available():
        cuda = PlannedDevice.of(config(), small_footprint(), AskedDevice())
        assert memory_rate(cuda, None).bytes_per_s > link_rate(cuda, None, None).bytes_per_s


def test_embeddings_that_are_looked_up_are_not_read_whole(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(["--gpu-memory", "9e9", "--memory-bandwidth", "1e9", "--link", "1e9"])
    device = PlannedDevice("cuda", "a GPU", 1 << 30, None)
    document = NodePlanner(config(), small_footprint(), options, device).as_document()
    forecast = document["forecast"]
    assert isinstance(forecast, dict)
    read_nbytes = DENSE_NBYTES - 10 * MIB + 8 * small_footprint().spec.layout.blob_nbytes
    # And what 32 tokens have of KV.
    assert forecast["all_resident_s"][0] == pytest.approx(read_nbytes / 1e9, rel=0.01)
    assert capsys.readouterr().out == ""
