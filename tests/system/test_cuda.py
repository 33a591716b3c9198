"""The whole path on a GPU: pack, store process, registered arena, copy stream, both engines, gRPC, client."""

from pathlib import Path

import pytest
import torch

from compute_node.config import DeviceChoice
from expert_store.pack.packer import pack_checkpoint
from promoe import Client
from promoe.model_spec import Dtype
from promoe.node_report import EngineKind
from tests.families import SECOND_ENGINE_FAMILIES, VOCABULARY, save_tiny_checkpoint
from tests.running_node import NodeThread
from tests.running_store import RunningStore
from tests.system.test_exactness import ask_together, node_config, oracle, random_prompts

NUM_TOKENS = 24


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "mixtral", "qwen3_moe"])
def test_greedy_tokens_on_a_gpu_equal_generate(family: str, tmp_path: Path, socket_dir: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "checkpoint", torch.float32)
    prompts = random_prompts(3, len(VOCABULARY), 40)
    expected = oracle(checkpoint, prompts, NUM_TOKENS)
    pack_dir = tmp_path / "pack"
    manifest = pack_checkpoint(checkpoint, pack_dir, dtype=Dtype.FLOAT32)
    with RunningStore(pack_dir, socket_dir) as store:
        for slots, chunk_bytes in ((1, 500), (manifest.spec.num_experts // 2, 1 << 20)):
            config = node_config(pack_dir, store, device=DeviceChoice.CUDA, expert_slots=slots, chunk_bytes=chunk_bytes)
            with NodeThread(config) as node, Client(node.endpoint) as client:
                info = client.info()
                expected_kind = EngineKind.INTERLEAVED if family in SECOND_ENGINE_FAMILIES else EngineKind.CONTINUOUS
                assert info.engine is expected_kind, info.engine_reason
                assert (info.device.kind, info.device.link) == ("cuda", "registered")
                assert ask_together(node.endpoint, prompts, NUM_TOKENS) == expected
                assert client.cache_stats().decode.misses > 0, "the experts did come through the link"
