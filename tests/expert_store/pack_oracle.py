"""What a pack must hold: the tensors that Transformers itself loads from the same checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from promoe.ids import ExpertId
from promoe.pack_manifest import DENSE_FOLDER, PackManifest, layer_file


def expert_tensors(pack_dir: Path, manifest: PackManifest, expert: ExpertId) -> dict[str, torch.Tensor]:
    """An expert's tensors, read from the pack by nothing but the manifest's numbers."""
    layout = manifest.spec.layout
    content = layer_file(pack_dir, expert.layer).read_bytes()
    begin = expert.expert * layout.blob_stride_nbytes
    blob = bytearray(content[begin : begin + layout.blob_nbytes])
    dtype = getattr(torch, layout.dtype.value)
    return {
        slot.name: torch.frombuffer(blob, dtype=dtype, count=slot.nbytes // dtype.itemsize, offset=slot.offset).view(
            slot.shape
        )
        for slot in layout.tensors
    }


def dense_tensors(pack_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the pack's dense checkpoint, whatever its number of files."""
    files = sorted((pack_dir / DENSE_FOLDER).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_pack_equals_checkpoint(
    pack_dir: Path, manifest: PackManifest, checkpoint: Path, dtype: torch.dtype | str = "auto"
) -> None:
    """Every blob and every dense tensor is bit for bit what `from_pretrained` loads, and nothing is missing."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    expected = model.state_dict()
    for layer, module in enumerate(manifest.layer_modules):
        parameters = {slot.name: expected.pop(f"{module}.{slot.name}") for slot in manifest.spec.layout.tensors}
        for expert in range(manifest.spec.num_experts):
            for name, tensor in expert_tensors(pack_dir, manifest, ExpertId(layer, expert)).items():
                assert_same_bits(tensor, parameters[name][expert], f"L{layer}E{expert}.{name}")
    dense = dense_tensors(pack_dir)
    for second, first in model.all_tied_weights_keys.items():
        assert second not in dense, f"{second} is {first} and stored again"
        expected.pop(second)
    assert dense.keys() == expected.keys()
    for name, tensor in dense.items():
        assert_same_bits(tensor, expected[name], name)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal dtype, shape and bytes (so that NaN equals NaN and 0.0 is not -0.0)."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    same = found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))
    assert same, f"{name} differs"
