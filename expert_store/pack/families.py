"""Which model families can be packed, and the sentence for those that cannot."""

from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype

_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
"""How configs call their number of experts; tells a dense model from one whose experts we cannot reach."""


def supported_families() -> tuple[str, ...]:
    """Model types whose experts go through Transformers' experts interface, read off the installed Transformers."""
    models = Path(transformers.__file__).parent / "models"
    reached = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if b"@use_experts_implementation" in path.read_bytes()
    }
    return tuple(
        sorted(family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if model_type_to_module_name(family) in reached)
    )


def refuse_unsupported_config(name: str, config: dict[str, object]) -> None:
    """Raises ModelUnsupported for a checkpoint that its config.json already rules out."""
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ModelUnsupported(f"The config.json of {name} names no model_type.{_supported_sentence()}")
    if family not in CONFIG_MAPPING:
        if "auto_map" in config:
            reason = "needs code of its own (auto_map), and promoe runs no remote code"
        else:
            reason = f"is unknown to Transformers {transformers.__version__}"
        raise ModelUnsupported(f"{name}: its family {family!r} {reason}.{_supported_sentence()}")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelUnsupported(f"{name} ({family}) is not a text-generation model.{_supported_sentence()}")
    _refuse_quantised(name, config)


def no_experts(name: str, config: dict[str, object]) -> ModelUnsupported:
    """The refusal of a model in which no experts module was found."""
    family = config.get("model_type")
    text = config.get("text_config")
    keys = config.keys() | (text.keys() if isinstance(text, dict) else set())
    if any(key in keys for key in _EXPERTS_KEYS) and family not in supported_families():
        return ModelUnsupported(
            f"{name}: the family {family!r} keeps its experts outside of Transformers' experts interface, so promoe "
            f"cannot move them.{_supported_sentence()}"
        )
    return ModelUnsupported(f"{name} ({family}) is a dense model: it has no MoE layers.{_supported_sentence()}")


def _refuse_quantised(name: str, config: dict[str, object]) -> None:
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        quantised = section.get("quantization_config") or section.get("compression_config")
        if quantised:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise ModelUnsupported(
                f"{name} is a quantised checkpoint (method {method}). promoe packs checkpoints in "
                f"{', '.join(dtype.value for dtype in Dtype)}; use an unquantised copy of the model."
            )


def _supported_sentence() -> str:
    return f" Families that work: {', '.join(supported_families())}."
