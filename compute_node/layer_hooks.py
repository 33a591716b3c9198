"""Hooks on the decoder layers that hold the MoE layers: where layer inputs are seen, for any family.

Knows Transformers' module trees by name only: a decoder layer is what a list of layers holds above an experts module.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import nn

from promoe.errors import ModelUnsupported


class InputWatcher(Protocol):
    """Sees the residual stream; called on the engine thread."""

    def layer_input(self, layer: int, hidden_TD: torch.Tensor) -> None:
        """The decoder layer of MoE layer `layer` begins with these hidden states."""

    def last_output(self, hidden_TD: torch.Tensor) -> None:
        """What leaves the last decoder layer."""


def decoder_layers(model: nn.Module, layer_modules: Sequence[str]) -> tuple[list[nn.Module], nn.Module]:
    """The decoder layer of each MoE layer, and the last decoder layer of all.

    Args:
        model: the Transformers model.
        layer_modules: per MoE layer the name of its experts module, as in the pack's manifest.

    Raises:
        ModelUnsupported: an experts module that is in no list of layers, or two in one layer.
    """
    named = dict(model.named_modules())
    layers: list[nn.Module] = []
    layer_list: nn.ModuleList | None = None
    for name in layer_modules:
        place = _place_in_list(named, name)
        if place is None or named[place] in layers:
            raise ModelUnsupported(f"The experts module {name} has no decoder layer of its own.")
        layers.append(named[place])
        layer_list = cast(nn.ModuleList, named[place.rpartition(".")[0]])
    assert layer_list is not None, "a pack has at least one MoE layer"
    return layers, layer_list[len(layer_list) - 1]


def install_hooks(
    model: nn.Module,
    layer_modules: Sequence[str],
    watcher: InputWatcher,
    on_layer_begin: Callable[[int], None],
) -> Callable[[], None]:
    """Tells `watcher` each layer's input and then `on_layer_begin`; returns what takes the hooks away again.

    Raises:
        ModelUnsupported: see `decoder_layers`.
    """
    layers, last = decoder_layers(model, layer_modules)

    def before(layer: int) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def hook(module: nn.Module, positional: tuple[object, ...], named: dict[str, object]) -> None:
            watcher.layer_input(layer, _rows_of(_hidden_given(positional, named)))
            on_layer_begin(layer)

        return hook

    def after(module: nn.Module, positional: tuple[object, ...], output: object) -> None:
        # A tensor, or in older layers a tuple that begins with it.
        watcher.last_output(_rows_of(output[0] if isinstance(output, tuple) else output))

    handles = [module.register_forward_pre_hook(before(layer), with_kwargs=True) for layer, module in enumerate(layers)]
    handles.append(last.register_forward_hook(after))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _place_in_list(named: Mapping[str, nn.Module], name: str) -> str | None:
    """The outermost ancestor of a module that is an item of a list."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        if isinstance(named.get(".".join(parts[: length - 1])), nn.ModuleList):
            return ".".join(parts[:length])
    return None


def _hidden_given(positional: tuple[object, ...], named: dict[str, object]) -> object:
    return positional[0] if positional else named["hidden_states"]


def _rows_of(hidden: object) -> torch.Tensor:
    """(1, T, D), (B, T, D) or (T, D) -> (T, D) over all sequences."""
    assert isinstance(hidden, torch.Tensor), f"a decoder layer passes on a tensor, not a {type(hidden).__name__}"
    return hidden.reshape(-1, hidden.shape[-1])
