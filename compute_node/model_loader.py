"""Builds the Transformers model of a pack: dense weights on the device, experts on meta.

Knows the pack's dense folder and Transformers' model classes; experts' bytes are the expert cache's business.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from compute_node.expert_weights import TORCH_DTYPES, check_layout
from compute_node.moe_forward import EXPERTS_IMPLEMENTATION, register_experts_function
from promoe.errors import InsufficientMemory, PackDamaged
from promoe.pack_manifest import DENSE_FOLDER, PackManifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model without its experts.

    Attributes:
        model: in eval mode; its experts modules dispatch to the experts function and have no weights.
        experts_modules: by MoE layer.
        dense_nbytes: of parameters and buffers on the device.
    """

    model: PreTrainedModel
    experts_modules: tuple[nn.Module, ...]
    dense_nbytes: int


def load_model(pack_dir: Path, manifest: PackManifest, device: torch.device) -> LoadedModel:
    """Loads the dense rest of a pack.

    Raises:
        InsufficientMemory: the dense weights do not fit the device.
        PackDamaged: a dense file is missing, truncated or not the one that was packed, or does not fit the model.
        ModelUnsupported: the pack's experts have parameters that cannot be computed with.
    """
    check_layout(manifest.spec.layout)
    _check_dense_files(pack_dir, manifest)
    register_experts_function()
    dense_dir = pack_dir / DENSE_FOLDER
    config = AutoConfig.from_pretrained(dense_dir, trust_remote_code=False)
    # Parameters are made on meta, so that experts never take memory; buffers are computed for real, as rotary
    # frequencies are in no checkpoint.
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=TORCH_DTYPES[manifest.spec.layout.dtype],
            experts_implementation=EXPERTS_IMPLEMENTATION,
        )
    experts_modules = _experts_modules(model, manifest)
    try:
        _assign_dense(model, dense_dir, experts_modules, device)
    except torch.OutOfMemoryError:
        dense_mib = sum(path.stat().st_size for path in dense_dir.glob("*.safetensors")) >> 20
        raise InsufficientMemory(
            f"The dense weights need {dense_mib} MiB of device memory, which is more than is free. "
            "Free memory on the device, or use --device cpu."
        ) from None
    if (dense_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(dense_dir)
    model.eval().requires_grad_(False)
    return LoadedModel(model, experts_modules, _dense_nbytes(model))


def _check_dense_files(pack_dir: Path, manifest: PackManifest) -> None:
    for name, checksum in manifest.dense_checksums.items():
        path = pack_dir / name
        if not path.is_file():
            raise PackDamaged(f"{path} is missing. Run `promoe pack` again.")
        digest = xxhash.xxh3_64()
        with path.open("rb") as file:
            while part := file.read(8 << 20):
                digest.update(part)
        if digest.intdigest() != int(checksum, 16):
            raise PackDamaged(
                f"{path} is not the file that was packed (its checksum differs). Run `promoe pack` again."
            )


def _experts_modules(model: PreTrainedModel, manifest: PackManifest) -> tuple[nn.Module, ...]:
    modules = dict(model.named_modules())
    missing = [name for name in manifest.layer_modules if name not in modules]
    if missing:
        raise PackDamaged(f"The pack has experts for {', '.join(missing)}, but the model has no such modules.")
    return tuple(modules[name] for name in manifest.layer_modules)


def _assign_dense(
    model: PreTrainedModel, dense_dir: Path, experts_modules: tuple[nn.Module, ...], device: torch.device
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(dense_dir.glob("*.safetensors")):
        tensors |= load_file(path, device=str(device))
    result = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if result.unexpected_keys:
        raise PackDamaged(f"The pack has weights that the model does not: {', '.join(result.unexpected_keys[:5])}.")
    routed = {id(parameter) for module in experts_modules for parameter in module.parameters(recurse=False)}
    absent = [name for name, p in model.named_parameters() if p.is_meta and id(p) not in routed]
    if absent:
        raise PackDamaged(f"The pack lacks weights that the model needs: {', '.join(absent[:5])}.")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _dense_nbytes(model: PreTrainedModel) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    return sum(tensors.values())
