"""Texts that every Python brings along, of two kinds, and how the demo model routes them: as steps of a recorded node.

A text's tokens go through the plain Transformers model in one pass, whose router inputs are those of decoding them one
by one; so nothing has to be generated, and what is served is exactly this text.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from predictor_service.routers import read_routers
from predictor_service.trace_playback import RecordedStep
from promoe.hint import StepSpan, StepStart
from promoe.model_spec import ModelSpec
from promoe.trace_events import LayerEvent
from tests.predictor_service.made_up_traces import rounded

PROMPT_TOKENS: Final = 8

MOST_OF_A_TEXT: Final = 4
"""Documents."""


def prose() -> Iterator[str]:
    """The language reference, a topic at a time."""
    for name in sorted(topics.topics):
        yield topics.topics[name]


def code() -> Iterator[str]:
    """The standard library, a module at a time."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(errors="replace")


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
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._routers = read_routers(pack, spec)
        self._router_inputs: list[torch.Tensor] = []
        for layer in self._model.model.layers:
            layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: self._router_inputs.append(inputs[0]))
        self._step = 0
        self._ended: tuple[str, ...] = ()

    def documents(self, texts: Iterator[str], kind: str, num_documents: int) -> Iterator[list[RecordedStep]]:
        """Equal parts of the texts, taken evenly from all of them."""
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
        for number in order[:num_documents]:
            yield self.steps(parts[number], f"{kind}-{number}-{self._step}")

    def steps(self, token_ids: list[int], request_id: str) -> list[RecordedStep]:
        """A prompt, and token by token what follows."""
        self._router_inputs.clear()
        with torch.inference_mode():
            self._model(input_ids=torch.tensor([token_ids]), use_cache=False, logits_to_keep=1)
        hidden_LTD = np.stack([values.reshape(len(token_ids), -1).numpy() for values in self._router_inputs])
        hidden_LTD = rounded(hidden_LTD)
        scores_LTE = hidden_LTD @ self._routers.weight_LED.transpose(0, 2, 1)
        topk_ids_LTK = np.argsort(-scores_LTE, axis=2)[:, :, : self._spec.experts_per_token].astype(np.uint16)
        spans = [(0, PROMPT_TOKENS), *((token, token + 1) for token in range(PROMPT_TOKENS, len(token_ids)))]
        return [self._recorded(request_id, slice(*span), hidden_LTD, topk_ids_LTK) for span in spans]

    def _recorded(self, request_id: str, part: slice, hidden_LTD: np.ndarray, topk_ids_LTK: np.ndarray) -> RecordedStep:
        self._step += 1
        num_tokens, is_prefill = part.stop - part.start, part.start == 0
        ended = self._ended if is_prefill else ()
        self._ended = (request_id,)
        layers = tuple(
            LayerEvent(
                0.0, 0.0, self._step, layer, topk_ids_LTK[layer, part], (), (), (), 0.0,
                rows=tuple(range(num_tokens)), router_input_RD=hidden_LTD[layer, part],
            )
            for layer in range(self._spec.num_moe_layers)
        )  # fmt: skip
        return RecordedStep(StepStart(self._step, (StepSpan(request_id, num_tokens, is_prefill),)), ended, layers)
