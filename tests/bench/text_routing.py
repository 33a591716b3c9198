"""Texts that every Python brings along, of two kinds, and how the demo model routes them: as steps of a recorded node.

A text's tokens go through the plain Transformers model in one pass, whose router inputs are those of decoding them one
by one; so nothing has to be generated, and what is served is exactly this text.
Shapes: B texts of a pass, T tokens, L MoE layers, D hidden, K experts per token.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from predictor_service.routers import read_routers
from predictor_service.trace_playback import RecordedStep
from promoe.hint import Float32Array, IdArray, StepSpan, StepStart
from promoe.model_spec import ModelSpec
from promoe.trace_events import LayerEvent
from tests.predictor_service.made_up_traces import rounded

PROMPT_TOKENS: Final = 8

MOST_OF_A_TEXT: Final = 4
"""Documents."""

_TEXTS_A_PASS: Final = 16
"""A token of one text alone takes four times as long: 32 experts of 24 units each have hardly anything to do."""


def prose() -> Iterator[str]:
    """The language reference, a topic at a time."""
    for name in sorted(topics.topics):
        yield topics.topics[name]


def code() -> Iterator[str]:
    """The standard library, a module at a time."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(errors="replace")


@dataclass(frozen=True, eq=False)
class RoutedText:
    """One document.

    Attributes:
        name: of its request.
        router_input_LTD: what each layer's router read, in bfloat16's values.
        topk_ids_LTK: what it chose.
    """

    name: str
    router_input_LTD: Float32Array
    topk_ids_LTK: IdArray

    def steps(self, first_step: int, ended: tuple[str, ...] = ()) -> list[RecordedStep]:
        """A prompt, and token by token what follows; the requests that ended are told with the first of them."""
        num_tokens = self.router_input_LTD.shape[1]
        spans = [(0, PROMPT_TOKENS), *((token, token + 1) for token in range(PROMPT_TOKENS, num_tokens))]
        return [
            self._step(first_step + number, slice(*span), ended if number == 0 else ())
            for number, span in enumerate(spans)
        ]

    def _step(self, step: int, part: slice, ended: tuple[str, ...]) -> RecordedStep:
        num_tokens, is_prefill = part.stop - part.start, part.start == 0
        layers = tuple(
            LayerEvent(
                0.0, 0.0, step, layer, self.topk_ids_LTK[layer, part], (), (), (), 0.0,
                rows=tuple(range(num_tokens)), router_input_RD=self.router_input_LTD[layer, part],
            )
            for layer in range(len(self.topk_ids_LTK))
        )  # fmt: skip
        return RecordedStep(StepStart(step, (StepSpan(self.name, num_tokens, is_prefill),)), ended, layers)


class TextRouting:
    """The demo model, and what it makes of texts.

    Args:
        checkpoint: its folder.
        pack: the pack's folder, for the routers.
        spec: the model.
        document_tokens: of a document.
    """

    def __init__(self, checkpoint: Path, pack: Path, spec: ModelSpec, document_tokens: int) -> None:
        self._spec = spec
        self._document_tokens = document_tokens
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, experts_implementation="grouped_mm"
        ).eval()
        self._routers = read_routers(pack, spec)
        self._router_inputs: list[torch.Tensor] = []
        for layer in self._model.model.layers:
            layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: self._router_inputs.append(inputs[0]))

    def documents(self, texts: Iterator[str], kind: str, num_documents: int) -> Iterator[RoutedText]:
        """Equal parts of the texts, taken evenly from all of them; made as they are asked for.

        Raises:
            ValueError: there are not so many.
        """
        parts: list[list[int]] = []
        for text in texts:
            ids = self._tokenizer(text[: MOST_OF_A_TEXT * self._document_tokens * 6])["input_ids"]
            parts += [
                ids[first : first + self._document_tokens]
                for first in range(0, len(ids) - self._document_tokens, self._document_tokens)
            ][:MOST_OF_A_TEXT]
        order = np.random.default_rng(0).permutation(len(parts))
        if len(order) < num_documents:
            raise ValueError(f"There are {len(order)} documents of {kind}; asked for {num_documents}.")
        return self._routed(kind, [(int(number), parts[number]) for number in order[:num_documents]])

    def _routed(self, kind: str, documents: list[tuple[int, list[int]]]) -> Iterator[RoutedText]:
        for first in range(0, len(documents), _TEXTS_A_PASS):
            chunk = documents[first : first + _TEXTS_A_PASS]
            hidden_BLTD = self._router_inputs_of([token_ids for _, token_ids in chunk])
            for (number, _), hidden_LTD in zip(chunk, hidden_BLTD, strict=True):
                scores_LTE = hidden_LTD @ self._routers.weight_LED.transpose(0, 2, 1)
                topk_ids_LTK = np.argsort(-scores_LTE, axis=2)[:, :, : self._spec.experts_per_token]
                yield RoutedText(f"{kind}-{number}", hidden_LTD, topk_ids_LTK.astype(np.uint16))

    def _router_inputs_of(self, token_ids_BT: list[list[int]]) -> Float32Array:
        """(B, L, T, D)"""
        self._router_inputs.clear()
        with torch.inference_mode():
            self._model(input_ids=torch.tensor(token_ids_BT), use_cache=False, logits_to_keep=torch.tensor([-1]))
        num_texts, num_tokens = len(token_ids_BT), self._document_tokens
        layers = [values.reshape(num_texts, num_tokens, -1).numpy() for values in self._router_inputs]
        return rounded(np.stack(layers, axis=1))
