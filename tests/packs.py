"""Tiny expert packs written directly in the pack's format, so that store tests need no model and no packer."""

import random
from pathlib import Path

import xxhash

from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from promoe.pack_manifest import PackManifest, layer_file


def synthetic_blob(seed: int, expert: ExpertId, nbytes: int) -> bytes:
    """The bytes of one expert: different for every seed and expert, and the same on every machine."""
    return random.Random(f"{seed} {expert}").randbytes(nbytes)


def write_synthetic_pack(
    pack_dir: Path, layers: int = 2, experts: int = 4, expert_hidden: int = 24, hidden: int = 32, seed: int = 0
) -> PackManifest:
    """Writes a whole pack of float32 experts (`gate_up_proj` (2F, D) and `down_proj` (D, F)) and its manifest."""
    layout = ExpertLayout.of(
        Dtype.FLOAT32, {"gate_up_proj": (2 * expert_hidden, hidden), "down_proj": (hidden, expert_hidden)}
    )
    spec = ModelSpec(
        name=f"synthetic-{seed}",
        family="synthetic",
        fingerprint=xxhash.xxh3_128_hexdigest(f"{seed} {layers} {experts} {expert_hidden} {hidden}".encode()),
        num_moe_layers=layers,
        num_experts=experts,
        experts_per_token=2,
        hidden_size=hidden,
        vocab_size=100,
        max_context_tokens=64,
        layout=layout,
    )
    checksums = []
    layer_file(pack_dir, 0).parent.mkdir(parents=True)
    for layer in range(layers):
        blobs = [synthetic_blob(seed, ExpertId(layer, expert), layout.blob_nbytes) for expert in range(experts)]
        checksums.append(tuple(xxhash.xxh3_64_hexdigest(blob) for blob in blobs))
        padding = bytes(layout.blob_stride_nbytes - layout.blob_nbytes)
        layer_file(pack_dir, layer).write_bytes(b"".join(blob + padding for blob in blobs))
    manifest = PackManifest(
        spec=spec,
        blob_checksums=tuple(checksums),
        layer_modules=tuple(f"model.layers.{layer}.mlp.experts" for layer in range(layers)),
        dense_checksums={},
        packed_with={"made by": "tests.packs"},
    )
    manifest.write(pack_dir)
    return manifest


def flip_bit(pack_dir: Path, expert: ExpertId, manifest: PackManifest) -> None:
    """Damages one bit in the middle of the expert's blob on disk."""
    layout = manifest.spec.layout
    with layer_file(pack_dir, expert.layer).open("r+b") as file:
        offset = expert.expert * layout.blob_stride_nbytes + layout.blob_nbytes // 2
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
