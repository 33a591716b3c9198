"""The two file writers against independent readers: safetensors' own library, and plain slicing of the bytes."""

from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from expert_store.pack.dense_folder import write_safetensors
from expert_store.pack.layer_file import LayerFileWriter
from expert_store.pack.packer import pack_checkpoint
from promoe.model_spec import BLOB_ALIGNMENT_NBYTES, Dtype, ExpertLayout
from promoe.pack_manifest import layer_file
from tests.expert_store.pack_oracle import assert_pack_equals_checkpoint, assert_same_bits
from tests.families import save_tiny_checkpoint

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(described=st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=6), seed=st.integers(0, 99))
def test_safetensors_files_are_read_by_the_library(
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (10 * torch.randn(shape, generator=generator)).to(dtype) for name, (dtype, shape) in described.items()
    }
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    assert write_safetensors(path, tensors) == path.stat().st_size
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(read[name].reshape(-1), tensor.reshape(-1), name)
        assert read[name].shape == tensor.shape


def test_a_tensor_that_is_not_contiguous_is_written_by_its_elements(tmp_path: Path) -> None:
    tensor = torch.arange(12).view(3, 4).t()
    write_safetensors(tmp_path / "x.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], tensor)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=4),
    num_experts=st.integers(1, 5),
    dtype=st.sampled_from(list(Dtype)),
    cut=st.integers(1, 5),
)
def test_blobs_lie_where_the_layout_says(
    shapes: list[tuple[int, ...]], num_experts: int, dtype: Dtype, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pack_dir = tmp_path_factory.mktemp("pack")
    layout = ExpertLayout.of(dtype, {f"p{n}": shape for n, shape in enumerate(shapes)})
    torch_dtype = getattr(torch, dtype.value)
    tensors = {slot.name: torch.randn(num_experts, *slot.shape).to(torch_dtype) for slot in layout.tensors}
    writer = LayerFileWriter(pack_dir, 3, layout, num_experts)
    for first in range(0, num_experts, cut):
        writer.put(first, {name: tensor[first : first + cut] for name, tensor in tensors.items()})
    assert not layer_file(pack_dir, 3).exists(), "nothing is visible before it is whole"
    checksums = writer.finish()

    content = layer_file(pack_dir, 3).read_bytes()
    assert len(content) == num_experts * layout.blob_stride_nbytes
    assert len(content) % BLOB_ALIGNMENT_NBYTES == 0
    for expert in range(num_experts):
        blob = content[expert * layout.blob_stride_nbytes :][: layout.blob_nbytes]
        assert xxhash.xxh3_64_hexdigest(blob) == checksums[expert]
        for slot in layout.tensors:
            raw = tensors[slot.name][expert].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert blob[slot.offset : slot.offset + slot.nbytes] == raw


def test_an_abandoned_layer_leaves_nothing(tmp_path: Path) -> None:
    layout = ExpertLayout.of(Dtype.FLOAT32, {"w": (2,)})
    writer = LayerFileWriter(tmp_path, 0, layout, 2)
    writer.put(0, {"w": torch.zeros(1, 2)})
    writer.abandon()
    writer.abandon()
    assert not list((tmp_path / "experts").iterdir())


def test_a_layer_with_an_expert_too_few_is_never_finished(tmp_path: Path) -> None:
    layout = ExpertLayout.of(Dtype.FLOAT32, {"w": (2,)})
    writer = LayerFileWriter(tmp_path, 0, layout, 2)
    writer.put(0, {"w": torch.zeros(1, 2)})
    with pytest.raises(AssertionError, match="given 1 experts"):
        writer.finish()
    writer.abandon()


def test_dense_weights_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_store.pack.dense_folder.MAX_SHARD_NBYTES", 8_000)
    model = save_tiny_checkpoint("qwen2_moe", tmp_path / "model", torch.bfloat16)
    manifest = pack_checkpoint(model, tmp_path / "pack")
    dense = tmp_path / "pack" / "dense"
    shards = sorted(path.name for path in dense.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (dense / "model.safetensors.index.json").is_file()
    assert_pack_equals_checkpoint(tmp_path / "pack", manifest, model)
