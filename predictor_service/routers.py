"""A pack's routers in numpy: what each scores the experts by, for the families whose rule is known here.

The routers' inputs are what the experts get too (`router_input`): the norm before the router is already applied.
Shapes: L MoE layers, R rows (tokens), D hidden, E experts, G groups of experts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import safetensors

from promoe.errors import ModelUnsupported, PackDamaged
from promoe.hint import Float32Array
from promoe.model_spec import ModelSpec
from promoe.pack_manifest import DENSE_FOLDER, ROUTERS_FILE


class Scoring(Enum):
    """What a family's router ranks the experts by; top-k of it is the routing."""

    LOGIT = "logit"
    # Softmax of the logits, plus a correction bias.
    SOFTMAX = "softmax"
    # Sigmoid of the logits, plus a correction bias.
    SIGMOID = "sigmoid"


SCORING_OF_FAMILY: Final = {
    **dict.fromkeys(
        (
            *("flex_olmo", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "minimax", "mixtral", "olmoe", "phimoe"),
            *("qwen2_moe", "qwen3_moe", "qwen3_next"),
        ),
        Scoring.LOGIT,
    ),
    **dict.fromkeys(("deepseek_v2", "ernie4_5_moe"), Scoring.SOFTMAX),
    **dict.fromkeys(("deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "solar_open"), Scoring.SIGMOID),
}
"""Read off Transformers' modelling files. Not here: families that keep the correction bias outside the router (afmoe,
minimax_m2), since a pack's routers lack it."""

_CORRECTION: Final = "e_score_correction_bias"
_NAME: Final = re.compile(r"layers\.(\d+)\.(.+)")
_NUMPY_OF_DTYPE: Final = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True, eq=False)
class Routers:
    """All MoE layers' routers.

    Attributes:
        scoring: the family's rule.
        weight_LED, bias_LE: of the linear map to logits.
        correction_LE: added to the scores for the choice; zeros where there is none.
        num_groups, groups_per_token: only the best groups' experts can be chosen; one group: no such limit.
    """

    scoring: Scoring
    weight_LED: Float32Array
    bias_LE: Float32Array
    correction_LE: Float32Array
    num_groups: int
    groups_per_token: int

    def scores(self, layer: int, router_input_RD: Float32Array) -> Float32Array:
        """(R, E): the larger, the sooner chosen; experts of groups that lose rank behind all others."""
        logits_RE: Float32Array = router_input_RD @ self.weight_LED[layer].T + self.bias_LE[layer]
        if self.scoring is Scoring.LOGIT:
            return logits_RE
        if self.scoring is Scoring.SIGMOID:
            scores_RE = (1 / (1 + np.exp(-np.maximum(logits_RE, -60)))).astype(np.float32)
        else:
            scores_RE = np.exp(logits_RE - logits_RE.max(axis=1, keepdims=True)).astype(np.float32)
            scores_RE /= scores_RE.sum(axis=1, keepdims=True)
        scores_RE += self.correction_LE[layer]
        return self._limited(scores_RE) if self.num_groups > 1 else scores_RE

    def _limited(self, scores_RE: Float32Array) -> Float32Array:
        """Lowers the losing groups' scores below all others, and keeps their order."""
        num_rows = len(scores_RE)
        members_RGE = np.sort(scores_RE.reshape(num_rows, self.num_groups, -1), axis=2)
        best = 2 if self.scoring is Scoring.SIGMOID else 1
        group_RG = members_RGE[:, :, -best:].sum(axis=2)
        losers_RG = np.argsort(-group_RG, axis=1)[:, self.groups_per_token :]
        limited_RGE = scores_RE.reshape(num_rows, self.num_groups, -1).copy()
        spread = float(scores_RE.max() - scores_RE.min()) + 1e-6
        for row, losers_G in enumerate(losers_RG):
            limited_RGE[row, losers_G] -= spread
        return limited_RGE.reshape(num_rows, -1)


def read_routers(pack: Path, spec: ModelSpec) -> Routers:
    """The routers of a pack.

    Raises:
        ModelUnsupported: a family whose rule is not known, or a pack without all routers.
        PackDamaged: files that cannot be read.
    """
    scoring = SCORING_OF_FAMILY.get(spec.family)
    if scoring is None:
        raise ModelUnsupported(
            f"How {spec.family} routes is not known to the predictor service, so its routers cannot look ahead. "
            f"Known: {', '.join(sorted(SCORING_OF_FAMILY))}."
        )
    tensors = _read_tensors(pack / ROUTERS_FILE)
    layers, experts, hidden = spec.num_moe_layers, spec.num_experts, spec.hidden_size
    weight_LED = np.zeros((layers, experts, hidden), np.float32)
    bias_LE = np.zeros((layers, experts), np.float32)
    correction_LE = np.zeros((layers, experts), np.float32)
    missing = set(range(layers))
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) >= layers:
            continue
        layer, parameter = int(match[1]), match[2]
        if tensor.shape == (experts, hidden):
            weight_LED[layer] = tensor
            missing.discard(layer)
        elif parameter.endswith(_CORRECTION) and tensor.size == experts:
            correction_LE[layer] = tensor.reshape(-1)
        elif parameter.endswith("bias") and tensor.shape == (experts,):
            bias_LE[layer] = tensor
    if missing:
        raise ModelUnsupported(
            f"The pack {pack} has no router of {experts} experts for {len(missing)} of {layers} MoE layers."
        )
    num_groups, groups_per_token = _groups(pack, spec)
    return Routers(scoring, weight_LED, bias_LE, correction_LE, num_groups, groups_per_token)


def _read_tensors(path: Path) -> Mapping[str, npt.NDArray[np.float32]]:
    """All tensors in float32."""
    try:
        raw = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        return {name: _widened(entry["dtype"], entry["data"]).reshape(entry["shape"]) for name, entry in raw}
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise PackDamaged(f"{path} cannot be read ({error}). Run `promoe pack` again.") from error


def _widened(dtype: str, data: bytes) -> Float32Array:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, _NUMPY_OF_DTYPE[dtype]).astype(np.float32)


def _groups(pack: Path, spec: ModelSpec) -> tuple[int, int]:
    """Number of groups of experts and how many of them a token may use; (1, 1) where the model has no groups."""
    path = pack / DENSE_FOLDER / "config.json"
    try:
        config = json.loads(path.read_text())
        config = config.get("text_config") or config
        num_groups, groups_per_token = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PackDamaged(f"{path} cannot be read ({error}). Run `promoe pack` again.") from error
    is_greedy = config.get("topk_method") == "greedy"
    if is_greedy or num_groups <= 1 or groups_per_token >= num_groups or spec.num_experts % num_groups:
        return 1, 1
    return num_groups, groups_per_token
