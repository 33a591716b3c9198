"""A made-up routing as a conversation: its visits for the optimum, and a model that is routed by it.

Shapes: T tokens, L MoE layers, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compute_node.planning.made_up_routing import IdsTLK
from compute_node.replay.belady import Visit


@dataclass(frozen=True)
class RoutedConversation:
    """A prompt, and how its tokens and those of the answer are routed.

    Attributes:
        prompt: token ids.
        ids_TLK: of the prompt's tokens and then the answer's.
    """

    prompt: tuple[int, ...]
    ids_TLK: IdsTLK

    def visits(self, layer: int) -> list[Visit]:
        """The prompt's union first, then token by token."""
        prompt_ids, answer_ids = np.split(self.ids_TLK[:, layer], [len(self.prompt)])
        visits = [Visit(frozenset(prompt_ids.ravel().tolist()), is_decode=False)]
        return visits + [Visit(frozenset(ids_K.tolist()), is_decode=True) for ids_K in answer_ids]


class RoutingOverride:
    """Routes a model's tokens by conversations instead of by its routers; weights are uniform.

    The routers compute all the same, so that nothing is saved by it.

    Attributes:
        number: of the conversation that is computed next; its prompt begins anew.
    """

    def __init__(
        self, modules: Sequence[nn.Module], conversations: Sequence[RoutedConversation], device: torch.device
    ) -> None:
        self.number = 0
        self._modules = modules
        self._ids = [torch.from_numpy(each.ids_TLK).to(device) for each in conversations]
        self._position = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context."""
        handles = [module.register_forward_pre_hook(self._hook(layer)) for layer, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
        is_last = layer == len(self._modules) - 1

        def reroute(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden_TD, topk_ids_TK, topk_weights_TK = arguments
            num_tokens, experts_per_token = topk_ids_TK.shape
            if layer == 0 and num_tokens > 1:
                self._position = 0
            ids_TLK = self._ids[self.number][self._position : self._position + num_tokens]
            if is_last:
                self._position += num_tokens
            ids_TK = ids_TLK[:, layer].to(topk_ids_TK.dtype)
            return hidden_TD, ids_TK, torch.full_like(topk_weights_TK, 1 / experts_per_token)

        return reroute
