"""The manifest of an expert pack: the contract between the packer, the store and the compute node.

A pack is a folder:

    manifest.json            this file; written last, so a pack without it is half a pack
    experts/layer_00000.bin  one file per MoE layer: the layer's blobs, each at a multiple of the blob stride
    dense/                   everything but the experts: a Transformers checkpoint with config and tokenizer
    routers.safetensors      the routers' tensors by MoE layer, `layers.<layer>.<name in the MoE block>`
    .lock                    held by a packer at work; empty
    .packing/                what an unfinished packing has finished; gone when the manifest is there
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import xxhash

from promoe.errors import ModelNotFound, PackDamaged
from promoe.ids import ExpertId
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec, TensorSlice

PACK_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
DENSE_FOLDER: Final = "dense"
EXPERTS_FOLDER: Final = "experts"
ROUTERS_FILE: Final = "routers.safetensors"


@dataclass(frozen=True)
class PackManifest:
    """What a pack holds.

    Attributes:
        spec: the model's geometry.
        blob_checksums: xxh3-64 of each blob (without alignment), hexadecimal, by layer and expert.
        layer_modules: per MoE layer the name of its experts module in the Transformers model.
        dense_checksums: xxh3-64 of each file of the pack outside `experts/`, by path relative to the pack.
        packed_with: versions of what made it, for people.
        source_fingerprint: names the checkpoint's files and the dtype it was packed in; empty if it had none.
    """

    spec: ModelSpec
    blob_checksums: tuple[tuple[str, ...], ...]
    layer_modules: tuple[str, ...]
    dense_checksums: dict[str, str]
    packed_with: dict[str, str]
    source_fingerprint: str = ""

    def checksum_of(self, expert: ExpertId) -> int:
        """xxh3-64 of the expert's blob."""
        return int(self.blob_checksums[expert.layer][expert.expert], 16)

    def as_text(self) -> str:
        """The file's content, with a checksum over itself."""
        document = {"pack_version": PACK_VERSION, **asdict(self), "spec": spec_document(self.spec)}
        document["manifest_checksum"] = _checksum(document)
        return json.dumps(document, indent=1)

    def write(self, pack_dir: Path) -> None:
        """Writes the manifest atomically; call it last."""
        partial = pack_dir / f"{MANIFEST_FILE}.tmp"
        with partial.open("w") as file:
            file.write(self.as_text())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(pack_dir / MANIFEST_FILE)

    @classmethod
    def read(cls, pack_dir: Path) -> "PackManifest":
        """Raises ModelNotFound if there is no pack, PackDamaged if the manifest is not one we can read."""
        path = pack_dir / MANIFEST_FILE
        if not pack_dir.is_dir():
            raise ModelNotFound(f"There is no folder {pack_dir}.")
        if not path.is_file():
            raise PackDamaged(f"{pack_dir} is not a finished pack: it has no {MANIFEST_FILE}. Run `promoe pack` again.")
        try:
            document = json.loads(path.read_text())
            if document["pack_version"] != PACK_VERSION:
                raise PackDamaged(
                    f"{path} is of pack version {document['pack_version']}; this promoe reads {PACK_VERSION}. "
                    "Run `promoe pack` again."
                )
            if document.pop("manifest_checksum") != _checksum(document):
                raise PackDamaged(f"{path} was changed after it was written. Run `promoe pack` again.")
            manifest = cls(
                spec=spec_of(document["spec"]),
                blob_checksums=tuple(tuple(layer) for layer in document["blob_checksums"]),
                layer_modules=tuple(document["layer_modules"]),
                dense_checksums=dict(document["dense_checksums"]),
                packed_with=dict(document["packed_with"]),
                source_fingerprint=str(document["source_fingerprint"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
            raise PackDamaged(f"{path} cannot be read as a manifest ({error!r}). Run `promoe pack` again.") from error
        manifest._check_shape(path)
        return manifest

    def check_files(self, pack_dir: Path) -> None:
        """Looks at names and lengths only; raises PackDamaged naming the first file that is missing or cut off."""
        expected = self.spec.num_experts * self.spec.layout.blob_stride_nbytes
        for layer in range(self.spec.num_moe_layers):
            path = layer_file(pack_dir, layer)
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
                raise PackDamaged(f"{path} {state}. Run `promoe pack` again with the same model and folder.")
        for name in self.dense_checksums:
            if not (pack_dir / name).is_file():
                raise PackDamaged(
                    f"{pack_dir / name} is missing. Run `promoe pack` again with the same model and folder."
                )

    def _check_shape(self, path: Path) -> None:
        spec = self.spec
        expected = [spec.num_experts] * spec.num_moe_layers
        found = [len(layer) for layer in self.blob_checksums]
        if found != expected:
            raise PackDamaged(f"{path} lists {found} checksums per layer where the model has {expected}.")
        if len(self.layer_modules) != spec.num_moe_layers:
            raise PackDamaged(f"{path} names {len(self.layer_modules)} of {spec.num_moe_layers} MoE layers' modules.")


def layer_file(pack_dir: Path, layer: int) -> Path:
    """The file with the blobs of one MoE layer."""
    return pack_dir / EXPERTS_FOLDER / f"layer_{layer:05d}.bin"


def _checksum(document: dict[str, object]) -> str:
    """xxh3-64 of the document's meaning: spacing and the order of keys do not count."""
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


def spec_document(spec: ModelSpec) -> dict[str, object]:
    """A geometry for JSON."""
    layout = {**asdict(spec.layout), "dtype": spec.layout.dtype.value}
    return {**asdict(spec), "layout": layout}


def spec_of(document: dict[str, object]) -> ModelSpec:
    """The geometry that `spec_document` wrote; raises KeyError, TypeError or ValueError for anything else."""
    layout = document["layout"]
    if not isinstance(layout, dict):
        raise TypeError("layout is not an object")
    tensors = tuple(
        TensorSlice(str(t["name"]), tuple(int(n) for n in t["shape"]), int(t["offset"]), int(t["nbytes"]))
        for t in layout["tensors"]
    )
    text = {key: str(document[key]) for key in ("name", "family", "fingerprint")}
    numbers = {
        key: int(str(document[key]))
        for key in (
            "num_moe_layers",
            "num_experts",
            "experts_per_token",
            "hidden_size",
            "vocab_size",
            "max_context_tokens",
        )
    }
    return ModelSpec(
        name=text["name"],
        family=text["family"],
        fingerprint=text["fingerprint"],
        num_moe_layers=numbers["num_moe_layers"],
        num_experts=numbers["num_experts"],
        experts_per_token=numbers["experts_per_token"],
        hidden_size=numbers["hidden_size"],
        vocab_size=numbers["vocab_size"],
        max_context_tokens=numbers["max_context_tokens"],
        layout=ExpertLayout(Dtype.parse(str(layout["dtype"])), tensors),
    )
