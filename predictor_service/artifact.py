"""Trained predictors as files: one safetensors file each, whose metadata holds the manifest and a checksum.

Knows no predictor: what the tensors mean is the kind's business. Nothing is pickled, and torch is not needed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import Float32Array, ObservedKind
from promoe.model_spec import ModelSpec

FORMAT_VERSION: Final = 1
"""Readers refuse others."""

SUFFIX: Final = ".safetensors"

_MANIFEST_KEY: Final = "promoe.artifact"
_CHECKSUM_KEY: Final = "promoe.checksum"
_CODES_SUFFIX: Final = ".int4"
_SCALE_SUFFIX: Final = ".scale"
_COLUMNS_SUFFIX: Final = ".columns"

GROUP_COLUMNS: Final = 32
"""Neighbouring weights of a row that share a scale."""

_MAX_CODE: Final = 7
_CODE_OF_ZERO: Final = 8
_SMALLEST_SCALE: Final = np.float32(1e-8)


@dataclass(frozen=True)
class ArtifactManifest:
    """What an artifact is, and for which model.

    Attributes:
        kind: the plug-in that reads it.
        name, version: of this training; a predictor's version is `name@version`.
        fingerprints: of the packs it fits. The same weights in another dtype route alike, but have another fingerprint.
        num_moe_layers, num_experts, experts_per_token, hidden_size: of the model.
        observed: which hidden states it reads.
        features: what else it reads, for people; the kind fixes what they are.
        lookaheads: that it predicts at, in MoE layers.
        training: data, its size, objective and settings, for people.
        metrics: measured on documents that were not trained on.
        parent: the version that training began from, `name@version`; empty where it began from nothing.
    """

    kind: str
    name: str
    version: str
    fingerprints: tuple[str, ...]
    num_moe_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    observed: ObservedKind
    features: tuple[str, ...]
    lookaheads: tuple[int, ...]
    training: dict[str, str | int | float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str = ""

    def check_model(self, spec: ModelSpec, path: Path) -> None:
        """Raises ModelMismatch, with both sides, unless it was trained for this model."""
        ours = (self.num_moe_layers, self.num_experts, self.experts_per_token, self.hidden_size)
        theirs = (spec.num_moe_layers, spec.num_experts, spec.experts_per_token, spec.hidden_size)
        if spec.fingerprint not in self.fingerprints or ours != theirs:
            raise ModelMismatch(
                f"{path} was trained for fingerprint {' or '.join(self.fingerprints)} ({_geometry(*ours)}), and this "
                f"pack of {spec.name} has fingerprint {spec.fingerprint} ({_geometry(*theirs)}). "
                "Train one for it with `promoe predictor train`."
            )


def _geometry(num_moe_layers: int, num_experts: int, experts_per_token: int, hidden_size: int) -> str:
    return f"{num_moe_layers} layers, {experts_per_token} of {num_experts} experts, hidden size {hidden_size}"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A manifest and its tensors, float32 however they are stored."""

    manifest: ArtifactManifest
    tensors: dict[str, Float32Array]
    path: Path
    nbytes: int

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        """Raises InvalidInput unless there is such a tensor, of this shape, of finite numbers."""
        found = self.tensors.get(name)
        if found is None or found.shape != shape:
            what = "missing" if found is None else f"of shape {found.shape}"
            raise InvalidInput(f"{self.path}: tensor {name} is {what}; expected shape {shape}.")
        if not np.isfinite(found).all():
            raise InvalidInput(f"{self.path}: tensor {name} holds numbers that are not finite.")
        return found


def quantized(name: str, weight_OI: Float32Array) -> dict[str, np.ndarray]:
    """A matrix, or a stack of them, in 4 bits and a float16 scale per 32 columns: a seventh of float32's bytes.

    A column more than a multiple of 32 is padded with zeros; two codes share a byte, the even column's in its low half.
    """
    columns = weight_OI.shape[-1]
    padding = [(0, 0)] * (weight_OI.ndim - 1) + [(0, -columns % GROUP_COLUMNS)]
    groups = np.pad(weight_OI, padding).reshape(*weight_OI.shape[:-1], -1, GROUP_COLUMNS)
    scale = (np.abs(groups).max(axis=-1) / _MAX_CODE).astype(np.float16)
    divisor = np.maximum(scale.astype(np.float32), _SMALLEST_SCALE)[..., None]
    codes = (np.clip(np.rint(groups / divisor), -_MAX_CODE, _MAX_CODE) + _CODE_OF_ZERO).astype(np.uint8)
    codes = codes.reshape(*weight_OI.shape[:-1], -1)
    return {
        name + _CODES_SUFFIX: codes[..., 0::2] | codes[..., 1::2] << 4,
        name + _SCALE_SUFFIX: scale,
        name + _COLUMNS_SUFFIX: np.array([columns], np.int64),
    }


def compact(tensors: Mapping[str, Float32Array]) -> dict[str, np.ndarray]:
    """Tensors as an artifact stores them: matrices (`….weight`) in 4 bits, the rest as they are."""
    stored: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        stored |= quantized(name, values) if name.endswith(".weight") else {name: values}
    return stored


def _dequantized(name: str, stored: Mapping[str, np.ndarray]) -> Float32Array:
    packed, scale = stored[name + _CODES_SUFFIX], stored[name + _SCALE_SUFFIX]
    codes = np.stack([packed & 0xF, packed >> 4], axis=-1).astype(np.float32) - _CODE_OF_ZERO
    groups = codes.reshape(*scale.shape, GROUP_COLUMNS) * scale[..., None].astype(np.float32)
    columns = int(stored[name + _COLUMNS_SUFFIX][0])
    return np.ascontiguousarray(groups.reshape(*scale.shape[:-1], -1)[..., :columns])


def write_artifact(path: Path, manifest: ArtifactManifest, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    document = {"format": FORMAT_VERSION, **asdict(manifest), "observed": manifest.observed.value}
    text = json.dumps(document, sort_keys=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    content = save(arrays, {_MANIFEST_KEY: text, _CHECKSUM_KEY: _checksum(text, arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_artifact(path: Path) -> Artifact:
    """Reads and checks a file.

    Raises:
        ModelNotFound: there is none.
        InvalidInput: it is no artifact, one of another format, or damaged.
    """
    manifest, stored = _read(path, with_tensors=True)
    try:
        return Artifact(manifest, _float32_of(stored), path, path.stat().st_size)
    except (KeyError, IndexError, ValueError, OSError) as error:
        raise InvalidInput(f"The predictor artifact {path} is damaged: {error}.") from error


def read_manifest(path: Path) -> ArtifactManifest:
    """What the file says it is, without its tensors and their checksum; raises what `read_artifact` does."""
    return _read(path, with_tensors=False)[0]


def _read(path: Path, *, with_tensors: bool) -> tuple[ArtifactManifest, dict[str, np.ndarray]]:
    if not path.is_file():
        raise ModelNotFound(f"There is no predictor artifact at {path}.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys()) if with_tensors else []
            stored: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in names}
        text = metadata.get(_MANIFEST_KEY)
        if text is None:
            raise InvalidInput(f"{path} is no predictor artifact: it has no manifest.")
        if with_tensors and metadata.get(_CHECKSUM_KEY) != _checksum(text, stored):
            raise InvalidInput(f"The predictor artifact {path} is damaged: its checksum differs.")
        return _manifest_of(json.loads(text), path), stored
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InvalidInput(f"The predictor artifact {path} is damaged: {error}.") from error


def _float32_of(stored: Mapping[str, np.ndarray]) -> dict[str, Float32Array]:
    tensors: dict[str, Float32Array] = {}
    for name, array in stored.items():
        if name.endswith(_CODES_SUFFIX):
            plain = name.removesuffix(_CODES_SUFFIX)
            tensors[plain] = _dequantized(plain, stored)
        elif not name.endswith((_SCALE_SUFFIX, _COLUMNS_SUFFIX)):
            tensors[name] = array.astype(np.float32)
    return tensors


def _checksum(manifest_text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """xxh3-128 over the manifest and every tensor's name, type, shape and bytes."""
    digest = xxhash.xxh3_128(manifest_text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return str(digest.hexdigest())


def _manifest_of(document: dict[str, object], path: Path) -> ArtifactManifest:
    if document["format"] != FORMAT_VERSION:
        raise InvalidInput(
            f"{path} is a predictor artifact of format {document['format']}, and this promoe reads {FORMAT_VERSION}."
        )
    return ArtifactManifest(
        kind=str(document["kind"]),
        name=str(document["name"]),
        version=str(document["version"]),
        fingerprints=tuple(map(str, _list(document, "fingerprints"))),
        num_moe_layers=_integer(document["num_moe_layers"]),
        num_experts=_integer(document["num_experts"]),
        experts_per_token=_integer(document["experts_per_token"]),
        hidden_size=_integer(document["hidden_size"]),
        observed=ObservedKind(document["observed"]),
        features=tuple(map(str, _list(document, "features"))),
        lookaheads=tuple(map(_integer, _list(document, "lookaheads"))),
        training=_table(document, "training"),
        metrics={key: float(value) for key, value in _table(document, "metrics").items()},
        # Artifacts from before there were registries do not say.
        parent=str(document.get("parent", "")),
    )


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value


def _list(document: dict[str, object], key: str) -> list[object]:
    value = document[key]
    if not isinstance(value, list):
        raise TypeError(f"{key} is no list")
    return value


def _table(document: dict[str, object], key: str) -> dict[str, str | int | float]:
    value = document[key]
    if not isinstance(value, dict):
        raise TypeError(f"{key} is no table")
    return {str(name): item for name, item in value.items()}
