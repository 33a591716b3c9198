"""The experts function: Transformers' MoE layers call it in place of their own.

Shapes: T tokens, K experts per token, D hidden, F expert hidden. Exactness: every expert computes alone on its own
rows, always the same rows in the same order, and outputs are reduced in fixed k order over [T, K, D]; so the order in
which experts arrive cannot change a bit.
Source of the module's interface: transformers.integrations.moe (`use_experts_implementation`).
"""

from dataclasses import dataclass
from typing import Final, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from compute_node.cache_stats import StepRecorder
from compute_node.expert_cache import ExpertCache
from compute_node.expert_weights import ExpertWeights
from compute_node.layer_observer import LayerObserver

EXPERTS_IMPLEMENTATION: Final = "promoe"


class ExpertsModule(Protocol):
    """What Transformers' experts modules say about themselves."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...

    def act_fn(self, up_out: torch.Tensor) -> torch.Tensor:
        """The activation of experts without a gate."""

    def post_expert_norm(self, down_out: torch.Tensor) -> torch.Tensor:
        """The norm behind every expert, where there is one."""


@dataclass(frozen=True)
class Routing:
    """One layer's routing of one step: rows (token, k), N = T * K, grouped by expert.

    Attributes:
        ids_TK: on the host.
        experts: the distinct experts.
        bounds: rows of expert i in the grouped order are `bounds[i]:bounds[i + 1]`.
        order_N: on the device: the rows in grouped order; None when that is the order they are in.
    """

    ids_TK: np.ndarray
    experts: list[int]
    bounds: list[int]
    order_N: torch.Tensor | None

    @classmethod
    def of(cls, topk_ids_TK: torch.Tensor) -> "Routing":
        """Groups rows by expert. The copy to the host is the layer's only synchronisation."""
        num_tokens, experts_per_token = topk_ids_TK.shape
        # Queued before the copy, so that the device sorts while the host waits.
        order_N = topk_ids_TK.reshape(-1).argsort(stable=True) if num_tokens > 1 else None
        ids_TK: np.ndarray = topk_ids_TK.cpu().numpy()
        if order_N is None:
            experts: list[int] = ids_TK[0].tolist()
            if len(set(experts)) == experts_per_token:
                return cls(ids_TK, experts, list(range(experts_per_token + 1)), None)
            order_N = topk_ids_TK.reshape(-1).argsort(stable=True)
        distinct, counts = np.unique(ids_TK, return_counts=True)
        return cls(ids_TK, distinct.tolist(), [0, *np.cumsum(counts).tolist()], order_N)

    def group(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Every row's hidden states in grouped order, (N, D)."""
        experts_per_token = self.ids_TK.shape[1]
        if self.order_N is None:
            return hidden_TD.expand(experts_per_token, -1)
        return hidden_TD[self.order_N // experts_per_token]

    def ungroup(self, grouped_ND: torch.Tensor) -> torch.Tensor:
        """Back to (T, K, D)."""
        num_tokens, experts_per_token = self.ids_TK.shape
        rows_ND = grouped_ND
        if self.order_N is not None:
            rows_ND = torch.empty_like(grouped_ND)
            rows_ND[self.order_N] = grouped_ND
        return rows_ND.view(num_tokens, experts_per_token, -1)


class MoeForward:
    """Computes one MoE layer out of the expert cache.

    Args:
        layer: MoE layer.
        weights: by slot index.
        expert_cache: hands out slots in order of arrival.
        recorder: told what every layer asked of the cache.
        observer: told every layer's routing and what the router read.
    """

    def __init__(
        self,
        layer: int,
        weights: list[ExpertWeights],
        expert_cache: ExpertCache,
        recorder: StepRecorder,
        observer: LayerObserver,
    ) -> None:
        self.layer = layer
        self._weights = weights
        self._expert_cache = expert_cache
        self._recorder = recorder
        self._observer = observer
        self._compute_dtype = weights[0].compute_dtype

    def __call__(
        self,
        module: ExpertsModule,
        hidden_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """The routed experts' weighted sum, (T, D) in `hidden_TD`'s dtype."""
        routing = Routing.of(topk_ids_TK)
        grouped_ND = routing.group(hidden_TD).to(self._compute_dtype)
        outputs: list[torch.Tensor] = [hidden_TD] * len(routing.experts)
        group_of = {expert: group for group, expert in enumerate(routing.experts)}
        with self._expert_cache.acquire(self.layer, routing.experts, routing.ids_TK) as acquisition:
            # While the link is busy with what is missing.
            self._observer.routed(self.layer, routing.ids_TK, hidden_TD, acquisition.ready)
            for expert, slot_index in self._expert_cache.arrivals(acquisition):
                group = group_of[expert]
                rows_ND = grouped_ND[routing.bounds[group] : routing.bounds[group + 1]]
                outputs[group] = compute_expert(module, rows_ND, self._weights[slot_index])
        self._recorder.record_layer(acquisition, routing.ids_TK)
        output_TKD = routing.ungroup(torch.cat(outputs))
        return (output_TKD * topk_weights_TK.unsqueeze(-1)).sum(dim=1).to(hidden_TD.dtype)


def compute_expert(module: ExpertsModule, rows_ND: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """One expert on its rows: (N, D) -> (N, D) in the rows' dtype, before the routing weight."""
    up_NF = _project(rows_ND, weights.up, weights.up_bias, module.is_transposed)
    inner_NF = module._apply_gate(up_NF) if module.has_gate else module.act_fn(up_NF)
    out_ND = _project(inner_NF, weights.down, weights.down_bias, module.is_transposed)
    # Transformers 5.17 knows no norm behind experts, and its modules do not say that they have none.
    has_post_norm = getattr(module, "has_post_expert_norm", False)
    return module.post_expert_norm(out_ND.to(weights.down.dtype)).to(out_ND.dtype) if has_post_norm else out_ND


def _project(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    # Nothing is copied where the dtypes are the same, which is everywhere but for small experts on a CPU.
    weight = weight.to(rows.dtype)
    bias = None if bias is None else bias.to(rows.dtype)
    if not is_transposed:
        return nn.functional.linear(rows, weight, bias)
    out = rows @ weight
    return out if bias is None else out + bias


def experts_function(
    module: nn.Module, hidden_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
) -> torch.Tensor:
    """What Transformers dispatches to; the layer's MoeForward hangs on the module (`install`)."""
    forward = cast(MoeForward, module.promoe_forward)
    return forward(cast(ExpertsModule, module), hidden_TD, topk_ids_TK, topk_weights_TK)


def register_experts_function() -> None:
    """Makes `experts_implementation="promoe"` known to Transformers; idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_function)


def install(module: nn.Module, forward: MoeForward) -> None:
    """Gives an experts module the layer that computes for it."""
    # Not a submodule: it owns no parameters, and Transformers must not walk into it.
    object.__setattr__(module, "promoe_forward", forward)
