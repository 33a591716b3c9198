"""`promoe plan` against reality: what was said of a checkpoint before it was packed, and what the running parts take.

The demo model through the command itself and three processes; tiny random models of other families through the same
planning code, a store process, and a node's parts in this process, whose tensors can be looked at.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from compute_node.config import ComputeConfig, DeviceChoice
from compute_node.expert_weights import ExpertWeights
from compute_node.planning.node_plan import NodePlanner
from compute_node.planning.options import parse_options
from compute_node.planning.planned_device import AskedDevice, PlannedDevice
from expert_store.pack.footprint import footprint_of
from expert_store.pack.packer import pack_checkpoint
from promoe import Client
from tests.families import SECOND_ENGINE_FAMILIES, save_tiny_checkpoint
from tests.running_node import NodeThread, RunningNode
from tests.running_store import RunningStore

WITHIN = 0.05
MIB = 1 << 20
PAGE_NBYTES = 4096


def arena_nbytes(store: RunningStore) -> int:
    """The size of the memfd that the store process holds."""
    (size,) = {each.stat().st_size for each in Path(f"/proc/{store.process.pid}/fd").iterdir() if is_arena(each)}
    return size


def is_arena(descriptor: Path) -> bool:
    try:
        return "memfd:promoe-arena" in str(descriptor.readlink())
    except FileNotFoundError:  # closed while it was looked at
        return False


def files_nbytes(pack_dir: Path) -> int:
    return sum(path.stat().st_size for path in pack_dir.rglob("*") if path.is_file())


def slots_nbytes() -> set[int]:
    """Of the memory that experts' weights in slots lie in, in this process, without the page that aligns it."""
    weights = [each for each in gc.get_objects() if type(each) is ExpertWeights]
    return {each.up.untyped_storage().nbytes() - PAGE_NBYTES for each in weights}


def kv_nbytes() -> set[int]:
    """Of the paged KV memories in this process."""
    return {each.cache_tensor.nbytes for each in gc.get_objects() if type(each) is PagedAttentionCache}


@pytest.mark.parametrize(("family", "dtype"), [
    ("qwen3_moe", torch.bfloat16), ("gpt_oss", torch.float32), ("deepseek_v2", torch.bfloat16),
])  # fmt: skip
def test_tiny_random_models_take_what_was_planned(
    family: str, dtype: torch.dtype, tmp_path: Path, socket_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / family, dtype)
    footprint = footprint_of(str(checkpoint))
    pack_dir = tmp_path / "pack"
    with caplog.at_level("INFO"):
        pack_checkpoint(checkpoint, pack_dir)
        assert files_nbytes(pack_dir) == pytest.approx(footprint.pack_nbytes, rel=WITHIN)
        with RunningStore(pack_dir, socket_dir) as store:
            store.wait_until_full()
            assert arena_nbytes(store) == footprint.arena_nbytes
            config = ComputeConfig(
                pack=pack_dir, store_endpoint=store.endpoint, device=DeviceChoice.CPU, cache_rate=0.5, num_threads=1
            )
            device = PlannedDevice.of(config, footprint, AskedDevice())
            plan = NodePlanner(config, footprint, parse_options([]), device).needs.plan()
            assert plan is not None
            with NodeThread(config) as running, Client(running.endpoint) as client:
                shape = client.info().expert_cache
                measured_slots_nbytes, measured_kv_nbytes = slots_nbytes(), kv_nbytes()
    assert (shape.slots_per_layer, shape.slot_nbytes) == (plan.slots_per_layer, plan.slot_nbytes)
    assert plan.slots_nbytes in measured_slots_nbytes
    if family not in SECOND_ENGINE_FAMILIES:
        assert any(each == pytest.approx(plan.kv_nbytes, rel=WITHIN) for each in measured_kv_nbytes)
    said = logged_plan(caplog.text)
    assert said["dense weights"] == pytest.approx(plan.dense_nbytes, rel=WITHIN)
    assert said["KV blocks"] == pytest.approx(plan.kv_nbytes, rel=WITHIN)


def logged_plan(log: str) -> dict[str, float]:
    """Bytes by part, of the line in which a node says what it decided."""
    (line,) = re.findall(r"Memory plan: (.*)\.", log)
    found = re.findall(r"(dense weights|expert slots|KV blocks|workspace)[^,]*? ([\d.]+) MiB", line)
    return {name: float(mib) * MIB for name, mib in found}


def test_the_demo_model_takes_what_the_command_said(
    demo_checkpoint: Path, demo_pack_bf16: Path, tmp_path: Path, socket_dir: Path
) -> None:
    asked = ("--cache-rate", "0.5", "--context", "512", "--concurrency", "2", "--memory", "600MiB", "--device", "cpu")
    command = [sys.executable, "-c", "from promoe.cli.app import main; main()", "plan", str(demo_checkpoint), *asked]
    settings = (
        "compute.cache_rate=0.5",
        "compute.max_context_tokens=512",
        "compute.max_concurrent_requests=2",
        f"compute.memory_bytes={600 * MIB}",
    )
    with RunningStore(demo_pack_bf16, socket_dir) as store:
        store.wait_until_serving()
        with RunningNode(demo_pack_bf16, store.endpoint, tmp_path, *settings) as node:
            # The node loads meanwhile.
            done = subprocess.run(
                [*command, "--link", "100MB/s", "--json"],
                capture_output=True, text=True, check=False, env={**os.environ, "PROMOE_HOME": str(tmp_path)},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            document = json.loads(done.stdout)
            with node.client() as client:
                info = client.info()
            assert arena_nbytes(store) == document["model"]["arena_nbytes"]
    needs = {each["name"]: each["need_nbytes"] for each in document["resources"]}
    assert needs["pack on disk"] == pytest.approx(files_nbytes(demo_pack_bf16), rel=WITHIN)
    said = logged_plan(node.log.read_text())
    assert said["dense weights"] == pytest.approx(needs["dense weights"], rel=WITHIN)
    assert said["KV blocks"] == pytest.approx(needs["KV blocks"], rel=WITHIN)
    assert said["workspace"] == pytest.approx(needs["workspace"], rel=WITHIN)
    slots = info.expert_cache
    measured_nbytes = slots.slots_per_layer * slots.slot_nbytes * info.model.num_moe_layers
    assert needs["expert slots"] == measured_nbytes
    assert document["memory_plan"]["max_context_tokens"] == info.limits.max_context_tokens
