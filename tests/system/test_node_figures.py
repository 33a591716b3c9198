"""What a node says about itself adds up: usage, cache statistics, the Prometheus page and GetInfo tell one story."""

import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from compute_node.config import ComputeConfig, DeviceChoice
from expert_store.pack.packer import pack_checkpoint
from promoe import Client
from promoe.cache_map import ExpertBit
from promoe.model_spec import ModelSpec
from promoe.node_report import PredictorState
from tests.families import save_tiny_checkpoint
from tests.running_node import NodeThread
from tests.running_store import RunningStore

SLOTS = 3


@dataclass(frozen=True)
class Watched:
    """A serving node, and where its metrics are."""

    client: Client
    spec: ModelSpec
    metrics_url: str

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels."""
        with urllib.request.urlopen(self.metrics_url) as page:
            families = text_string_to_metric_families(page.read().decode())
            samples = [sample for family in families for sample in family.samples]
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, f"{name} {labels} is on the page"
        return sum(found)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    save_tiny_checkpoint("qwen2_moe", folder / "checkpoint", torch.float32)
    pack_checkpoint(folder / "checkpoint", folder / "pack", dtype=None)
    return folder / "pack"


@pytest.fixture
def watched(pack_dir: Path, socket_dir: Path) -> Iterator[Watched]:
    with RunningStore(pack_dir, socket_dir) as store:
        listen = f"127.0.0.1:{free_port()}"
        config = ComputeConfig(
            pack=pack_dir,
            store_endpoint=store.endpoint,
            device=DeviceChoice.CPU,
            expert_slots=SLOTS,
            max_context_tokens=256,
            metrics_listen=listen,
            num_threads=1,
        )
        with NodeThread(config) as node, Client(node.endpoint) as client:
            yield Watched(client, node.node.spec, f"http://{listen}/metrics")


def test_one_answer_is_told_alike_everywhere(watched: Watched) -> None:
    before = watched.client.cache_stats()
    assert (before.decode.hits, before.decode.misses, before.prefill.steps) == (0, 0, 0), "trying the engine is not use"
    answer = watched.client.complete([5, 6, 7, 8, 9], max_tokens=20, ignore_eos=True)
    usage, stats, spec = answer.usage, watched.client.cache_stats(), watched.spec
    assert usage is not None
    for told, counted, phase in ((usage.prefill, stats.prefill, "prefill"), (usage.decode, stats.decode, "decode")):
        assert (told.hits, told.misses) == (counted.hits, counted.misses)
        num_absent = told.misses - counted.late_prefetches
        assert told.loaded_bytes == counted.demand_bytes == num_absent * spec.layout.blob_nbytes
        assert watched.metric("promoe_expert_hits_total", phase=phase) == told.hits
        assert watched.metric("promoe_expert_misses_total", phase=phase) == told.misses
        assert watched.metric("promoe_expert_loaded_bytes_total", phase=phase, reason="demand") == told.loaded_bytes
        assert watched.metric("promoe_stall_seconds_total", phase=phase) == pytest.approx(counted.stall_s)
    # The last token drawn is not fed back: 19 decode steps, each with every layer's routed experts.
    assert usage.decode.hits + usage.decode.misses == 19 * spec.num_moe_layers * spec.experts_per_token
    assert (stats.prefill.tokens, stats.decode.tokens, stats.decode.steps) == (5, 19, 19)
    assert sum(layer.hits + layer.misses for layer in stats.layers) >= usage.decode.hits + usage.decode.misses
    # Layers share their slots, and something may have been loaded ahead for a step that there was not.
    held = sum(layer.resident + layer.loading for layer in stats.layers)
    assert 0 < held <= SLOTS * spec.num_moe_layers
    assert watched.metric("promoe_resident_experts") == sum(layer.resident for layer in stats.layers)
    assert watched.metric("promoe_ttft_seconds_count") == 1
    assert watched.metric("promoe_tokens_total", kind="output") == 20
    assert watched.metric("promoe_requests_total", outcome="finished") == 1
    assert watched.metric("promoe_store_attached") == 1
    assert watched.metric("promoe_prefetched_bytes_total", outcome="streamed") == stats.prefetch.streamed_bytes
    assert watched.metric("promoe_predictor_connected") == 0
    assert watched.client.info().predictor.state is PredictorState.NONE


def test_the_cache_map_is_what_the_last_step_left(watched: Watched) -> None:
    client, spec = watched.client, watched.spec
    before = client.cache_map()
    assert not any(bits & (ExpertBit.LOADING | ExpertBit.HINTED) for bits in before.experts)
    client.complete([5, 6, 7, 8, 9], max_tokens=6, ignore_eos=True)
    after, stats = client.cache_map(), client.cache_stats()
    assert (after.num_moe_layers, after.num_experts) == (spec.num_moe_layers, spec.num_experts)
    assert (after.step - before.step, after.layer) == (6, spec.num_moe_layers - 1)
    for row, layer in zip(after.by_layer, stats.layers, strict=True):
        routed = [bits for bits in row if bits & ExpertBit.ROUTED]
        assert len(routed) == spec.experts_per_token, "the last step was a decode step of one token"
        assert all(bits & ExpertBit.ROUTED for bits in row if bits & ExpertBit.MISSED)
        assert sum(bits & ExpertBit.RESIDENT for bits in row) == layer.resident


def test_info_is_the_plan(watched: Watched) -> None:
    info = watched.client.info()
    assert info.expert_cache.slots_per_layer == SLOTS
    assert info.expert_cache.cache_rate == pytest.approx(SLOTS / watched.spec.num_experts)
    assert (info.device.kind, info.device.link) == ("cpu", "memcpy")
    assert info.limits.max_context_tokens == 256
    assert info.store.arena_kind == "memfd"
