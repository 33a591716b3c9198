"""What a model will take on disk, in the host's memory and on the device, from configs and headers alone.

Sizes are those of what packing would write and a compute node would load: the same conversion plan, the same layout,
the same file formats, without a weight.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import torch
import transformers

from expert_store.arena import ArenaLayout
from expert_store.pack.checkpoint import CONFIG_FILE, Checkpoint, read_config
from expert_store.pack.checkpoint_outline import CheckpointOutline, find_outline
from expert_store.pack.dense_folder import router_names, safetensors_start, tied_renames
from expert_store.pack.families import no_experts
from expert_store.pack.meta_model import MetaModel, load_config
from expert_store.pack.model_geometry import model_spec, packed_dtype
from expert_store.pack.verify import read_manifest
from promoe.errors import InvalidInput
from promoe.footprint import ModelFootprint
from promoe.model_spec import Dtype, ModelSpec
from promoe.pack_manifest import DENSE_FOLDER, EXPERTS_FOLDER, MANIFEST_FILE, ROUTERS_FILE, PackManifest

DEMO_MODEL: Final = "demo"
_DEMO_TOKENIZER_NBYTES: Final = 3_525_038
"""Its tokenizer and chat template, which are made from the base model and not kept here."""

_CHECKSUM: Final = "0" * 16
_FINGERPRINT: Final = "0" * 32


def footprint_of(model: str, dtype: Dtype | None = None) -> ModelFootprint:
    """The footprint of a pack, of a checkpoint folder, of a hub model, or (`demo`) of the demo model.

    Args:
        model: which; of a demo model that is built already give the folder.
        dtype: what it will be packed in; None: what its config says.

    Raises:
        ModelNotFound, ModelUnsupported, PackDamaged: it is not there, not supported, or not whole.
        InvalidInput: another dtype was asked of a pack.
    """
    if (Path(model).expanduser() / MANIFEST_FILE).is_file():
        return _of_pack(Path(model).expanduser(), dtype)
    if model == DEMO_MODEL:
        return _of_demo(dtype)
    outline = find_outline(model)
    checkpoint = outline.checkpoint
    config = load_config(checkpoint.folder)
    meta = MetaModel(config, dtype or packed_dtype(config, checkpoint))
    if not meta.experts:
        raise no_experts(checkpoint.name, checkpoint.config)
    made = {target for unit in meta.plan(checkpoint.tensors).dense for target in unit.targets}
    renames = tied_renames(meta.tied, made)
    return _before_packing(checkpoint, meta, {renames.get(name, name) for name in made}, outline)


def _of_pack(pack_dir: Path, dtype: Dtype | None) -> ModelFootprint:
    manifest = read_manifest(pack_dir)
    spec = manifest.spec
    if dtype not in (None, spec.layout.dtype):
        raise InvalidInput(f"{pack_dir} is a pack in {spec.layout.dtype.value}; give the checkpoint for another dtype.")
    dense = Checkpoint.read(spec.name, pack_dir / DENSE_FOLDER)
    meta = MetaModel(load_config(dense.folder), spec.layout.dtype)
    kept = (MANIFEST_FILE, ROUTERS_FILE, f"{DENSE_FOLDER}/**/*", f"{EXPERTS_FOLDER}/*")
    paths = {path for pattern in kept for path in pack_dir.glob(pattern) if path.is_file()}
    return ModelFootprint(
        spec=spec,
        config=dense.config,
        dense_nbytes=sum(tensor.end - tensor.begin for tensor in dense.tensors.values()) + _buffers_nbytes(meta),
        lookup_nbytes=_lookup_nbytes(meta),
        arena_nbytes=ArenaLayout.of(spec).nbytes,
        pack_nbytes=sum(path.stat().st_size for path in paths),
        source_nbytes=0,
        source_folder="",
        is_packed=True,
        read_from=f"the manifest and the headers in {pack_dir}",
    )


def _of_demo(dtype: Dtype | None) -> ModelFootprint:
    """From the config alone: the demo model is built here, not downloaded."""
    with as_file(files("expert_store.demo_model") / CONFIG_FILE) as path:
        checkpoint = Checkpoint(DEMO_MODEL, path.parent, read_config(path.parent), {}, fingerprint="")
        config = load_config(path.parent)
    own = packed_dtype(config, checkpoint)
    built, meta = MetaModel(config, own), MetaModel(config, dtype or own)
    experts = {module.target(parameter) for module in meta.experts for parameter in module.shapes}
    source_nbytes = sum(built.state_nbytes(name) for name in built.state_names if name not in built.tied)
    outline = CheckpointOutline(
        checkpoint, _DEMO_TOKENIZER_NBYTES, source_nbytes, None, "the config of the demo model, which is built here"
    )
    return _before_packing(checkpoint, meta, {*meta.state_names} - experts - meta.tied.keys(), outline)


def _before_packing(
    checkpoint: Checkpoint, meta: MetaModel, dense_names: set[str], outline: CheckpointOutline
) -> ModelFootprint:
    spec = model_spec(checkpoint.name, str(checkpoint.config["model_type"]), meta, meta.layout())
    state = meta.module("").state_dict()
    dense = {
        name: torch.empty(state[name].shape, dtype=meta.dtype_of(name), device="meta") for name in sorted(dense_names)
    }
    routers = {kept: dense[name] for name, kept in router_names(meta) if name in dense}
    config_text = meta.config.to_json_string()
    return ModelFootprint(
        spec=spec,
        config=json.loads(config_text),
        dense_nbytes=sum(tensor.nbytes for tensor in dense.values()) + _buffers_nbytes(meta),
        lookup_nbytes=_lookup_nbytes(meta),
        arena_nbytes=ArenaLayout.of(spec).nbytes,
        pack_nbytes=(
            spec.num_blobs * spec.layout.blob_stride_nbytes
            + _safetensors_nbytes(dense)
            + _safetensors_nbytes(routers)
            + len(config_text.encode())
            + len(_manifest_text(spec, meta).encode())
            + outline.copied_nbytes
        ),
        source_nbytes=outline.download_nbytes,
        source_folder=str(outline.download_folder or ""),
        is_packed=False,
        read_from=outline.read_from,
    )


def _buffers_nbytes(meta: MetaModel) -> int:
    """Of what no checkpoint holds, such as rotary frequencies."""
    stored = set(meta.state_names)
    return sum(buffer.nbytes for name, buffer in meta.module("").named_buffers() if name not in stored)


def _lookup_nbytes(meta: MetaModel) -> int:
    """Of the input embeddings, unless they are the output's too and read whole for every token."""
    model = meta.module("")
    assert isinstance(model, transformers.PreTrainedModel), "a meta model is a Transformers model"
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    tied = {*meta.tied, *meta.tied.values()}
    return sum(
        meta.state_nbytes(name) for name, p in model.named_parameters() if id(p) in embeddings and name not in tied
    )


def _safetensors_nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """As one file; a further shard is a header more."""
    return len(safetensors_start(tensors.items())) + sum(tensor.nbytes for tensor in tensors.values())


def _manifest_text(spec: ModelSpec, meta: MetaModel) -> str:
    """With checksums that are as long as the real ones."""
    names = (ROUTERS_FILE, *(f"{DENSE_FOLDER}/{name}" for name in (CONFIG_FILE, "model.safetensors", "tokenizer.json")))
    return PackManifest(
        spec=replace(spec, fingerprint=_FINGERPRINT),
        blob_checksums=((_CHECKSUM,) * spec.num_experts,) * spec.num_moe_layers,
        layer_modules=tuple(module.name for module in meta.experts),
        dense_checksums=dict.fromkeys(names, _CHECKSUM),
        packed_with={"transformers": transformers.__version__, "torch": str(torch.__version__)},
        source_fingerprint=f"{_FINGERPRINT}-{spec.layout.dtype.value}",
    ).as_text()
