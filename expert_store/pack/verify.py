"""Checks a pack's bytes against its checksums. Torch-free, so that checking starts at once."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import xxhash

from expert_store.pack.progress import NoProgress, PackProgress
from promoe.errors import PackDamaged
from promoe.ids import ExpertId
from promoe.model_spec import ExpertLayout
from promoe.pack_manifest import PackManifest, layer_file

_MAX_THREADS: Final = 8
_READ_NBYTES: Final = 4 << 20


def read_manifest(pack_dir: Path) -> PackManifest:
    """The manifest of a pack whose files are all there and as long as they should be; no weight is read.

    Raises:
        ModelNotFound: there is no such folder.
        PackDamaged: it is no finished pack, or a file is missing, cut off or too long.
    """
    manifest = PackManifest.read(pack_dir)
    manifest.check_files(pack_dir)
    return manifest


def verify_pack(pack_dir: Path, progress: PackProgress | None = None) -> PackManifest:
    """Reads every byte of a pack and compares it with its checksums.

    Raises:
        ModelNotFound: there is no such folder.
        PackDamaged: the text names every damaged expert and file.
    """
    told = progress or NoProgress()
    manifest = read_manifest(pack_dir)
    spec = manifest.spec
    told.begin("Checking the pack", spec.num_blobs * spec.layout.blob_stride_nbytes, spec.num_moe_layers)
    experts = damaged_experts(pack_dir, spec.layout, dict(enumerate(manifest.blob_checksums)), told)
    files = damaged_files(pack_dir, manifest.dense_checksums)
    found = [f"{expert} in {layer_file(pack_dir, expert.layer).name}" for expert in experts] + files
    if found:
        raise PackDamaged(
            f"{pack_dir} is damaged: {', '.join(found)}. Run `promoe pack` again with the same model and folder: it "
            "makes anew only what is damaged."
        )
    return manifest


def damaged_experts(
    pack_dir: Path,
    layout: ExpertLayout,
    checksums_by_layer: Mapping[int, tuple[str, ...]],
    progress: PackProgress,
) -> list[ExpertId]:
    """The experts of these layers whose bytes are not those that were written, read by several threads."""

    def check(layer: int) -> list[ExpertId]:
        damaged = _damaged_in_layer(pack_dir, layout, layer, checksums_by_layer[layer], progress)
        progress.finish_layer()
        return damaged

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "pack-verify") as pool:
        return [expert for damaged in pool.map(check, sorted(checksums_by_layer)) for expert in damaged]


def damaged_files(pack_dir: Path, checksums: Mapping[str, str]) -> list[str]:
    """Of these files (by path relative to the pack), those that are missing or changed."""
    return [
        name
        for name, checksum in sorted(checksums.items())
        if not (pack_dir / name).is_file() or file_checksum(pack_dir / name) != checksum
    ]


def file_checksum(path: Path) -> str:
    """xxh3-64 of a file, hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as stream:
        while part := stream.read(_READ_NBYTES):
            digest.update(part)
    return str(digest.hexdigest())


def _damaged_in_layer(
    pack_dir: Path, layout: ExpertLayout, layer: int, checksums: tuple[str, ...], progress: PackProgress
) -> list[ExpertId]:
    """A file of another length counts as damaged in every expert: its offsets cannot be trusted."""
    path = layer_file(pack_dir, layer)
    stride = layout.blob_stride_nbytes
    whole = path.is_file() and path.stat().st_size == stride * len(checksums)
    if not whole:
        progress.advance(stride * len(checksums))
        return [ExpertId(layer, expert) for expert in range(len(checksums))]
    damaged = []
    blob = memoryview(bytearray(stride))
    with path.open("rb", buffering=0) as stream:
        for expert, checksum in enumerate(checksums):
            filled = 0
            while filled < stride and (nbytes := stream.readinto(blob[filled:])):
                filled += nbytes
            if xxhash.xxh3_64_hexdigest(blob[: layout.blob_nbytes]) != checksum or filled < stride:
                damaged.append(ExpertId(layer, expert))
            progress.advance(stride)
    return damaged
