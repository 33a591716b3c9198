"""Writes everything but the experts: the dense weights as a Transformers checkpoint, the tokenizer, the routers."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch

from expert_store.pack.checkpoint import TensorReader
from expert_store.pack.layer_file import sync_folder, tensor_bytes, write_at
from expert_store.pack.meta_model import ConversionUnit, MetaModel
from expert_store.pack.verify import file_checksum
from promoe.errors import ModelUnsupported
from promoe.pack_manifest import DENSE_FOLDER, ROUTERS_FILE

MAX_SHARD_NBYTES: Final = 2 << 30
"""Bytes of one dense weights file: also about what packing holds in memory of the dense weights at a time."""

COPIED_FILES: Final = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""What people and tokenizers need beside the weights; taken as it is."""

_SAFETENSORS_DTYPES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_METADATA: Final = {"format": "pt"}


class DenseFolderWriter:
    """Fills `dense/` and the routers' file of a pack."""

    def __init__(self, model: MetaModel, pack_dir: Path) -> None:
        self._model = model
        self._pack_dir = pack_dir
        self._folder = pack_dir / DENSE_FOLDER
        self._stored: dict[str, torch.Tensor] = {}
        self._stored_nbytes = 0
        self._num_shards = 0
        self._shard_of: dict[str, int] = {}
        self._nbytes_of: dict[str, int] = {}
        self._routers: dict[str, torch.Tensor] = {}
        self._router_names = dict(router_names(model))

    def write(self, units: tuple[ConversionUnit, ...], read: TensorReader, source: Path) -> Iterator[int]:
        """Writes it all, yielding the bytes of each weights file after it is written."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        made = {target for unit in units for target in unit.targets}
        renames = tied_renames(self._model.tied, made)
        for unit in units:
            for name, tensor in self._model.convert(unit, read).items():
                self._take(renames.get(name, name), tensor)
            if self._stored_nbytes >= MAX_SHARD_NBYTES:
                yield self._flush_shard()
        if self._stored:
            yield self._flush_shard()
        yield write_safetensors(self._pack_dir / ROUTERS_FILE, self._routers)
        self._name_shards()
        self._model.save_config(self._folder)
        self._copy_files(source)
        for path in self._folder.rglob("*"):
            if path.is_file():
                _sync_file(path)
        sync_folder(self._folder)

    def checksums(self) -> dict[str, str]:
        """xxh3-64 of each file written, by its path relative to the pack."""
        paths = [self._pack_dir / ROUTERS_FILE, *(p for p in self._folder.rglob("*") if p.is_file())]
        return {str(path.relative_to(self._pack_dir)): file_checksum(path) for path in sorted(paths)}

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._shard_of:
            # Two names of one tied tensor, both stored; Transformers ties them only if they are equal.
            if name not in self._stored or not torch.equal(self._stored[name], tensor):
                raise ModelUnsupported(
                    f"The config ties another tensor to {name}, but the checkpoint holds different values for the "
                    "two. Set tie_word_embeddings to false in its config.json."
                )
            return
        self._stored[name] = tensor
        self._stored_nbytes += tensor.nbytes
        self._shard_of[name] = self._num_shards
        self._nbytes_of[name] = tensor.nbytes
        if name in self._router_names:
            self._routers[self._router_names[name]] = tensor.clone()

    def _flush_shard(self) -> int:
        nbytes = write_safetensors(self._folder / f"model-{self._num_shards:05d}.tmp", self._stored)
        self._num_shards += 1
        self._stored = {}
        self._stored_nbytes = 0
        return nbytes

    def _name_shards(self) -> None:
        """Gives the weights files the names that Transformers looks for, which need their number."""
        total = self._num_shards
        final = [f"model-{n + 1:05d}-of-{total:05d}.safetensors" for n in range(total)]
        if total == 1:
            final = ["model.safetensors"]
        for shard, name in enumerate(final):
            (self._folder / f"model-{shard:05d}.tmp").replace(self._folder / name)
        if total > 1:
            index = {
                "metadata": {"total_size": sum(self._nbytes_of.values())},
                "weight_map": {name: final[shard] for name, shard in self._shard_of.items()},
            }
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _copy_files(self, source: Path) -> None:
        for pattern in COPIED_FILES:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    target = self._folder / path.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


def router_names(model: MetaModel) -> Iterator[tuple[str, str]]:
    """State names of the routers' tensors, and their names in the routers' file (`layers.<layer>.<parameter>`).

    A router is a neighbour of an experts module with a weight of shape (experts, hidden size).
    """
    for layer, experts in enumerate(model.experts):
        block_name = experts.name.rpartition(".")[0]
        hidden_size = model.config.get_text_config().hidden_size
        for child_name, child in model.module(block_name).named_children():
            if f"{block_name}.{child_name}" == experts.name or not _looks_like_router(child_name):
                continue
            state = child.state_dict()
            if any(tuple(tensor.shape) == (experts.num_experts, hidden_size) for tensor in state.values()):
                for name in state:
                    yield f"{block_name}.{child_name}.{name}", f"layers.{layer}.{child_name}.{name}"


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Writes a safetensors file without copying the tensors; returns its bytes.

    The format is the header's length (u64, little-endian), the header (JSON, padded to 8) and the bytes; wide
    elements first, so that all are aligned (https://huggingface.co/docs/safetensors). Disk errors are OSError.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    start = safetensors_start(ordered)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_at(fd, memoryview(start), 0)
        position = len(start)
        for _, tensor in ordered:
            write_at(fd, tensor_bytes(tensor), position)
            position += tensor.nbytes
        os.fsync(fd)
    finally:
        os.close(fd)
    return position


def safetensors_start(ordered: Iterable[tuple[str, torch.Tensor]]) -> bytes:
    """What comes before the bytes of these tensors, which may be on meta."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for name, tensor in ordered:
        entry = {"dtype": _SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def tied_renames(tied: Mapping[str, str], made: set[str]) -> dict[str, str]:
    """Under which name a tied tensor is stored: once, under its first name, whichever the checkpoint used."""
    return {second: first for second, first in tied.items() if second in made}


def _looks_like_router(name: str) -> bool:
    return ("gate" in name or "router" in name) and "shared" not in name


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
