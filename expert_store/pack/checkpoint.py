"""A Hugging Face checkpoint on disk: its config, its safetensors files and what their headers say.

Knows nothing of models; refuses what can be refused from the files alone, before a weight is read.
"""

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import xxhash
from safetensors import safe_open

from promoe.errors import ModelNotFound, ModelUnsupported, PackDamaged
from promoe.model_spec import Dtype

CONFIG_FILE: Final = "config.json"
_SINGLE_FILE: Final = "model.safetensors"
_INDEX_FILE: Final = "model.safetensors.index.json"
_MAX_HEADER_NBYTES: Final = 512 << 20
_SAMPLE_NBYTES: Final = 64 << 10

DTYPE_OF_SAFETENSORS: Final = {"F32": Dtype.FLOAT32, "F16": Dtype.FLOAT16, "BF16": Dtype.BFLOAT16}
"""safetensors' spelling of the element types that experts may have."""

_INDEX_DTYPES: Final = frozenset({"I64", "I32", "BOOL", "F64"})
"""Element types of the odd buffer; anything else (F8, U8, I8 ...) means a quantised checkpoint."""


TensorReader = Callable[[str], torch.Tensor]
"""Gives a checkpoint's tensor by its name: a view of the mapped file, read from disk when touched."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, safetensors' element type, shape, and its bytes `[begin, end)` in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are complete.

    Attributes:
        name: what people call it (hub id or folder name).
        folder: where its files are.
        config: the content of its config.json.
        tensors: every stored tensor by its name in the checkpoint.
        fingerprint: xxh3-128 over the config and each file's header, size, time and samples of its bytes: the same
            files give the same one without reading them whole.
    """

    name: str
    folder: Path
    config: dict[str, object]
    tensors: dict[str, StoredTensor]
    fingerprint: str

    @classmethod
    def read(cls, name: str, folder: Path) -> "Checkpoint":
        """Reads config and headers.

        Raises:
            ModelNotFound: the folder or one of its files is missing.
            ModelUnsupported: it is not a safetensors checkpoint, or a quantised one.
            PackDamaged: a file is cut off or not what it should be.
        """
        config = read_config(folder)
        digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            header, found = _read_header(file)
            tensors.update(found)
            _add_file(digest, file, header)
        if (folder / _INDEX_FILE).is_file():
            _refuse_missing(folder, tensors)
        refuse_quantised_tensors(name, tensors)
        return cls(name, folder, config, tensors, digest.hexdigest())

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors.values())

    @contextmanager
    def open(self) -> Iterator[TensorReader]:
        """Maps the files while entered."""
        with ExitStack() as stack:
            opened = {
                file: stack.enter_context(safe_open(str(file), framework="pt", device="cpu")) for file in self.files
            }

            def read(key: str) -> torch.Tensor:
                tensor: torch.Tensor = opened[self.tensors[key].file].get_tensor(key)
                return tensor

            yield read


def read_config(folder: Path) -> dict[str, object]:
    """The content of the checkpoint's config.json; raises ModelNotFound or PackDamaged."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFound(f"{folder} is not a checkpoint: it has no {CONFIG_FILE}.")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise PackDamaged(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise PackDamaged(f"{path} does not hold a JSON object. Download it again.")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index_path = folder / _INDEX_FILE
    if index_path.is_file():
        files = sorted({folder / shard for shard in _read_index(index_path).values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelNotFound(
                f"{folder} lacks {len(missing)} of its {len(files)} weight files: {_some(missing)}. "
                "Download the checkpoint again."
            )
        return files
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        raise ModelNotFound(
            f"{folder} has {len(shards)} weight shards but no {_INDEX_FILE} to say which belong to it. "
            "Download the checkpoint again."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")) or any(folder.glob("*.gguf")):
        raise ModelUnsupported(
            f"{folder} holds weights, but not as safetensors, the only format promoe packs. Convert it with "
            "Transformers: from_pretrained(...) and then save_pretrained(...)."
        )
    raise ModelNotFound(f"{folder} holds no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackDamaged(f"{path} cannot be read as a weight index ({error!r}). Download it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise PackDamaged(f"{path} does not map tensors to files. Download it again.")
    return weight_map


def _read_header(file: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """The raw header and the tensors it names; a file shorter than they need is refused before it is mapped.

    The format is fixed: a little-endian u64 with the header's length, the header (JSON), the tensors' bytes
    (https://huggingface.co/docs/safetensors).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        header_nbytes = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if header_nbytes > min(size - 8, _MAX_HEADER_NBYTES):
            raise PackDamaged(f"{file} is cut off or not a safetensors file. Download it again.")
        raw = stream.read(header_nbytes)
    try:
        document = json.loads(raw)
        document.pop("__metadata__", None)
        data_begin = 8 + header_nbytes
        tensors = {
            str(key): StoredTensor(
                file,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                data_begin + int(entry["data_offsets"][0]),
                data_begin + int(entry["data_offsets"][1]),
            )
            for key, entry in document.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise PackDamaged(f"{file} has a damaged safetensors header ({error!r}). Download it again.") from error
    expected = max((tensor.end for tensor in tensors.values()), default=8 + header_nbytes)
    if size != expected:
        raise PackDamaged(f"{file} has {size} bytes where its header promises {expected}. Download it again.")
    return raw, tensors


def _add_file(digest: "xxhash.xxh3_128", file: Path, header: bytes) -> None:
    stat = file.stat()
    digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    digest.update(header)
    with file.open("rb") as stream:
        for part in range(8):
            stream.seek(stat.st_size * part // 8)
            digest.update(stream.read(_SAMPLE_NBYTES))


def _refuse_missing(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    if missing := [key for key in _read_index(folder / _INDEX_FILE) if key not in tensors]:
        raise PackDamaged(
            f"{folder}: its index names {len(missing)} tensors that its files do not hold: {_some(missing)}. "
            "Download the checkpoint again."
        )


def refuse_quantised_tensors(name: str, tensors: dict[str, StoredTensor]) -> None:
    """Raises ModelUnsupported naming the first tensor of an element type that cannot be packed."""
    known = DTYPE_OF_SAFETENSORS.keys() | _INDEX_DTYPES
    for key, tensor in tensors.items():
        if tensor.dtype not in known:
            raise ModelUnsupported(
                f"{name} is a quantised checkpoint ({key} is stored as {tensor.dtype}). promoe packs checkpoints in "
                f"{', '.join(dtype.value for dtype in Dtype)}; use an unquantised copy of the model."
            )


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = sorted(names, key=lambda name: [int(p) if p.isdigit() else 0 for p in re.split(r"(\d+)", name)])
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
