"""What is predicted from headers against what packing then writes."""

import json
from pathlib import Path

import pytest
import torch

from expert_store.arena import ArenaLayout
from expert_store.pack.footprint import footprint_of
from expert_store.pack.packer import pack_checkpoint
from promoe.errors import InvalidInput, ModelNotFound, ModelUnsupported
from promoe.footprint import ModelFootprint
from promoe.model_spec import Dtype
from tests.families import save_tiny_checkpoint

FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "exaone_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_is_as_large_as_was_said_before_it_was_made(family: str, tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(family, tmp_path / "tiny", torch.bfloat16)
    before = footprint_of(str(checkpoint))
    manifest = pack_checkpoint(checkpoint, tmp_path / "pack")
    after = footprint_of(str(tmp_path / "pack"))
    written_nbytes = sum(path.stat().st_size for path in (tmp_path / "pack").rglob("*") if path.is_file())
    assert after.pack_nbytes == written_nbytes
    assert before.pack_nbytes == pytest.approx(written_nbytes, rel=0.02)
    assert (before.dense_nbytes, before.lookup_nbytes) == (after.dense_nbytes, after.lookup_nbytes)
    assert before.arena_nbytes == after.arena_nbytes == ArenaLayout.of(manifest.spec).nbytes
    assert (before.spec.layout, before.spec.num_experts) == (manifest.spec.layout, manifest.spec.num_experts)
    assert (before.is_packed, after.is_packed, after.spec) == (False, True, manifest.spec)
    assert ModelFootprint.of_document(json.loads(json.dumps(before.as_document()))) == before


def test_another_number_format_is_reckoned_with(tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint("qwen3_moe", tmp_path / "tiny", torch.bfloat16)
    own, wide = footprint_of(str(checkpoint)), footprint_of(str(checkpoint), Dtype.FLOAT32)
    assert (own.spec.layout.dtype, wide.spec.layout.dtype) == (Dtype.BFLOAT16, Dtype.FLOAT32)
    assert wide.spec.experts_nbytes == 2 * own.spec.experts_nbytes
    assert own.dense_nbytes < wide.dense_nbytes <= 2 * own.dense_nbytes
    pack_checkpoint(checkpoint, tmp_path / "pack")
    with pytest.raises(InvalidInput, match=r"is a pack in bfloat16; give the checkpoint"):
        footprint_of(str(tmp_path / "pack"), Dtype.FLOAT32)


def test_the_demo_model_is_known_before_it_is_built() -> None:
    demo = footprint_of("demo")
    assert (demo.spec.num_moe_layers, demo.spec.num_experts, demo.spec.layout.dtype) == (30, 32, Dtype.BFLOAT16)
    # Its embeddings are the output's, too, and read whole for every token.
    assert (demo.lookup_nbytes, demo.source_folder) == (0, "")
    assert demo.source_nbytes > demo.dense_nbytes
    assert footprint_of("demo", Dtype.FLOAT32).source_nbytes == demo.source_nbytes, "it is built in its own format"


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="not a hub id"):
        footprint_of("no such model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"a": 1}}))
    with pytest.raises(ModelUnsupported, match="quantised"):
        footprint_of(str(tmp_path))
    with pytest.raises(InvalidInput, match="not a model's footprint"):
        ModelFootprint.of_document({"spec": {}})
    with pytest.raises(InvalidInput, match="JSON object"):
        ModelFootprint.of_document([])
