"""Layer inputs are seen where Transformers says they are, in every family and on both engines."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compute_node.engine import EngineKind
from compute_node.layer_hooks import decoder_layers, install_hooks
from promoe.errors import ModelUnsupported
from tests.compute_node.tiny_serving import SpanRecorder, engine_request, started_engine, submit
from tests.families import FAMILIES, HIDDEN_SIZE, NUM_LAYERS, SECOND_ENGINE_FAMILIES, make_tiny_model

PROMPT_IDS = [5, 9, 17, 33, 8]


@dataclass
class SeenLayers:
    """A watcher that keeps everything, and what the cache would be told."""

    inputs: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)

    def layer_input(self, layer: int, hidden_TD: torch.Tensor) -> None:
        self.inputs.append((layer, hidden_TD.clone()))
        self.events.append(("input", layer))

    def last_output(self, hidden_TD: torch.Tensor) -> None:
        self.outputs.append(hidden_TD.clone())
        self.events.append(("output", -1))

    def begin(self, layer: int) -> None:
        self.events.append(("begin", layer))


def expert_names(model: nn.Module) -> list[str]:
    """As the packer writes them into the manifest: the modules that Transformers dispatches."""
    return [name for name, module in model.named_modules() if hasattr(module, "is_transposed")]


def place_of(name: str) -> int:
    """The decoder layer's number in an experts module's name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_inputs_are_the_hidden_states_of_transformers(family: str) -> None:
    model = make_tiny_model(family)
    names, seen = expert_names(model), SeenLayers()
    remove = install_hooks(model, names, seen, seen.begin)
    with torch.no_grad():
        out = model(torch.tensor([PROMPT_IDS]), output_hidden_states=True, use_cache=False)
    remove()
    assert [layer for layer, _ in seen.inputs] == list(range(len(names)))
    for layer, hidden_TD in seen.inputs:
        assert hidden_TD.shape == (len(PROMPT_IDS), HIDDEN_SIZE)
        assert torch.equal(hidden_TD, out.hidden_states[place_of(names[layer])][0])
    (last_TD,) = seen.outputs
    # Transformers reports the last layer's output behind the model's final norm.
    norm = next(module for name, module in model.get_decoder().named_children() if name in ("norm", "final_layernorm"))
    torch.testing.assert_close(norm(last_TD), out.hidden_states[-1][0])
    assert len(out.hidden_states) == NUM_LAYERS + 1
    steps = [event for layer in range(len(names)) for event in (("input", layer), ("begin", layer))]
    assert seen.events == [*steps, ("output", -1)]


@pytest.mark.parametrize("family", ["mixtral", *sorted(SECOND_ENGINE_FAMILIES)[:1]])
def test_both_engines_show_a_row_for_every_token(family: str) -> None:
    model, seen, ledger = make_tiny_model(family), SeenLayers(), SpanRecorder()
    kind = EngineKind.INTERLEAVED if family in SECOND_ENGINE_FAMILIES else EngineKind.CONTINUOUS
    names = expert_names(model)
    remove = install_hooks(model, names, seen, seen.begin)
    with started_engine(kind, model, ledger) as engine:
        logs = [submit(engine, engine_request(f"r{i}", PROMPT_IDS * (i + 1), 4)) for i in range(3)]
        for log in logs:
            log.tokens_and_end()
    remove()
    tokens = [sum(span.num_tokens for span in step) for step in ledger.steps]
    assert [len(hidden_TD) for layer, hidden_TD in seen.inputs if layer == 0] == tokens
    assert [len(hidden_TD) for hidden_TD in seen.outputs] == tokens
    assert len(seen.inputs) == len(tokens) * len(names)


def test_removed_hooks_see_nothing() -> None:
    model, seen = make_tiny_model("mixtral"), SeenLayers()
    install_hooks(model, expert_names(model), seen, seen.begin)()
    with torch.no_grad():
        model(torch.tensor([PROMPT_IDS]))
    assert seen.events == []


def test_the_last_layer_may_be_a_dense_one() -> None:
    model = make_tiny_model("mixtral")
    layers, last = decoder_layers(model, expert_names(model)[:2])
    assert [id(layer) for layer in layers] == [id(layer) for layer in _layers_of(model)[:2]]
    assert last is _layers_of(model)[-1]


@pytest.mark.parametrize("twice", [False, True])
def test_an_experts_module_without_a_layer_of_its_own_is_refused(twice: bool) -> None:
    model = make_tiny_model("mixtral")
    names = expert_names(model)
    names = [names[0], names[0]] if twice else ["model.norm"]
    with pytest.raises(ModelUnsupported, match="has no decoder layer of its own"):
        decoder_layers(model, names)


def _layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_decoder().layers)
