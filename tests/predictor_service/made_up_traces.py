"""Traces whose routing can be learned from hidden states: a residual stream, random routers, and a word per token.

Every layer adds something of its own to the stream, so that a later layer's routing is predictable from an earlier
layer's hidden states, but not by applying the later router to them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from predictor_service.training.token_blocks import Split, TokenBlock
from promoe.hint import Float32Array, StepSpan
from promoe.model_spec import ModelSpec
from promoe.node_report import ModelInfo, Number
from promoe.pack_manifest import DENSE_FOLDER, ROUTERS_FILE
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceWriter
from promoe.trace_header import TraceHeader
from tests.predictor_service.layer_events import make_spec
from tests.promoe.traces import MadeUpRun

LAYERS, EXPERTS, PER_TOKEN, HIDDEN, WORDS = 5, 8, 2, 16, 24


def learnable_spec() -> ModelSpec:
    return make_spec(LAYERS, EXPERTS, PER_TOKEN, HIDDEN)


class LearnableModel:
    """Random weights; hidden states are rounded to bfloat16, as traces hold them."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.words_WD: Float32Array = rng.standard_normal((WORDS, HIDDEN)).astype(np.float32)
        self.mix_LDD: Float32Array = 0.5 * rng.standard_normal((LAYERS, HIDDEN, HIDDEN)).astype(np.float32)
        self.routers_LED: Float32Array = rng.standard_normal((LAYERS, EXPERTS, HIDDEN)).astype(np.float32)

    def run(self, words: np.ndarray, rng: np.random.Generator) -> tuple[Float32Array, Float32Array, np.ndarray]:
        """Of these tokens: layer inputs and last output (L + 1, T, D), router inputs (L, T, D), routing (L, T, K)."""
        stream_TD = self.words_WD[words] + 0.1 * rng.standard_normal((len(words), HIDDEN)).astype(np.float32)
        inputs, router_inputs, routings = [], [], []
        for layer in range(LAYERS):
            inputs.append(rounded(stream_TD))
            router_input_TD = rounded(stream_TD / np.abs(stream_TD).mean(axis=1, keepdims=True))
            scores_TE = router_input_TD @ self.routers_LED[layer].T
            router_inputs.append(router_input_TD)
            routings.append(np.argsort(-scores_TE, axis=1)[:, :PER_TOKEN])
            stream_TD = stream_TD + np.tanh(stream_TD @ self.mix_LDD[layer])
        inputs.append(rounded(stream_TD))
        return np.stack(inputs), np.stack(router_inputs), np.stack(routings).astype(np.uint16)

    def write_pack(self, folder: Path) -> Path:
        """What a predictor reads of a pack: the routers."""
        (folder / DENSE_FOLDER).mkdir(parents=True)
        (folder / DENSE_FOLDER / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
        routers = {f"layers.{layer}.gate.weight": self.routers_LED[layer] for layer in range(LAYERS)}
        save_file(routers, folder / ROUTERS_FILE)
        return folder

    def events(self, documents: int, tokens: int = 12, prompt: int = 3, seed: int = 1) -> Iterator[TraceEvent]:
        """One request after the other: a prompt, then token by token."""
        rng = np.random.default_rng(seed)
        step = 0
        ended: tuple[str, ...] = ()
        for document in range(documents):
            words = rng.integers(0, WORDS, tokens)
            inputs, router_inputs, routings = self.run(words, rng)
            for first, last in ((0, prompt), *((t, t + 1) for t in range(prompt, tokens))):
                step += 1
                now_s, part = step * 0.1, slice(first, last)
                yield StepEvent(now_s, step, (StepSpan(f"r{document}", last - first, first == 0),), ended)
                ended = ()
                for layer in range(LAYERS):
                    begin_s = now_s + 0.01 * layer
                    yield LayerEvent(
                        begin_s + 0.005, begin_s + 0.01, step, layer, routings[layer, part],
                        hits=tuple(np.unique(routings[layer, part]).tolist()), misses=(), late=(), stall_s=0.0,
                        rows=tuple(range(last - first)), layer_input_RD=inputs[layer, part],
                        router_input_RD=router_inputs[layer, part],
                        last_output_RD=inputs[LAYERS, part] if layer == LAYERS - 1 else None,
                    )  # fmt: skip
            ended = (f"r{document}",)

    def write_trace(self, path: Path, documents: int, seed: int = 1) -> Path:
        with TraceWriter(path, header_of(learnable_spec())) as writer:
            for event in self.events(documents, seed=seed):
                writer.append(event)
        return path

    def block(self, documents: int, tokens: int = 12, seed: int = 1, *, layer_input: bool = False) -> TokenBlock:
        """The same without a trace; all tokens but the first are decoded."""
        rng = np.random.default_rng(seed)
        runs = [self.run(rng.integers(0, WORDS, tokens), rng) for _ in range(documents)]
        hidden = np.concatenate([run[0 if layer_input else 1] for run in runs], axis=1)
        return TokenBlock(
            hidden_SND=(hidden.view(np.uint32) >> 16).astype(np.uint16),
            topk_ids_LNK=np.concatenate([run[2] for run in runs], axis=1),
            document_N=np.repeat(np.arange(documents), tokens),
            is_decode_N=np.tile(np.arange(tokens) > 0, documents),
        )


@dataclass(frozen=True)
class FixedBlocks:
    """A BlockSource of one block per side."""

    train: TokenBlock
    held_out: TokenBlock

    def __call__(self, split: Split) -> Iterator[TokenBlock]:
        yield self.train if split is Split.TRAIN else self.held_out


def header_of(spec: ModelSpec) -> TraceHeader:
    """Of a run of this model."""
    made_up = MadeUpRun().header()
    model = ModelInfo(
        spec.name, spec.family, spec.fingerprint, Number.FLOAT32, spec.num_moe_layers, spec.num_experts,
        spec.experts_per_token, spec.layout.blob_nbytes, spec.hidden_size, spec.vocab_size, spec.max_context_tokens,
    )  # fmt: skip
    return TraceHeader(
        made_up.service, model, made_up.shape, made_up.device, 1e6, 1.7e9, made_up.resident, made_up.history_json
    )


def rounded(values: Float32Array) -> Float32Array:
    rounded: Float32Array = (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded
