"""Conversations decoded one token at a time at batch 1, with the KV cache that `generate` would use.

Tokens are given, not sampled: every side computes the same ones. They follow Zipf's law, so that some routings come
again as in text. Random weights would wander off otherwise, each side after its own rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from compute_node.replay.belady import Visit
from compute_node.step_ledger import Phase

StepMark = Callable[[Phase, int], AbstractContextManager[None]]
"""Called around each forward pass with its phase and number of tokens."""


@dataclass(frozen=True)
class Conversation:
    """Token ids of the prompt, and those that are decoded after it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def zipf_conversation(seed: int, vocab_size: int, num_prompt: int, num_answer: int) -> Conversation:
    """Tokens of rank r are drawn with probability ~ 1/r."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, num_prompt + num_answer, replacement=True, generator=generator).tolist()
    return Conversation(tuple(ids[:num_prompt]), tuple(ids[num_prompt:]))


@dataclass
class Timing:
    """Seconds of the prefill and of each decoded token, with the token brought to the host."""

    ttft_s: float = 0.0
    token_s: list[float] = field(default_factory=list)


def unmarked(phase: Phase, num_tokens: int) -> AbstractContextManager[None]:
    """For models that nobody counts."""
    return nullcontext()


@torch.no_grad()
def decode(model: PreTrainedModel, conversation: Conversation, mark: StepMark = unmarked) -> Timing:
    """One conversation, from an empty KV cache."""
    device = model.device
    kv_cache = DynamicCache(config=model.config)
    timing = Timing()
    num_cached = 0
    for ids in (conversation.prompt, *((token,) for token in conversation.answer)):
        phase = Phase.DECODE if num_cached else Phase.PREFILL
        started_s = perf_counter()
        with mark(phase, len(ids)):
            output = model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.arange(num_cached, num_cached + len(ids), device=device)[None],
                past_key_values=kv_cache,
                use_cache=True,
                # An index, as the engines give it: a slice takes a slow way through the vocabulary.
                logits_to_keep=torch.tensor([len(ids) - 1], device=device),
            )
            int(output.logits[0, -1].argmax())
        num_cached += len(ids)
        if phase is Phase.DECODE:
            timing.token_s.append(perf_counter() - started_s)
        else:
            timing.ttft_s = perf_counter() - started_s
    return timing


@contextmanager
def recorded_routing(modules: tuple[nn.Module, ...]) -> Iterator[list[list[Visit]]]:
    """Within the context, every layer's distinct experts are noted step by step."""
    steps: list[list[Visit]] = [[] for _ in modules]

    def listen(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            ids_TK = arguments[1]
            steps[layer].append(Visit(frozenset(ids_TK.reshape(-1).tolist()), ids_TK.shape[0] == 1))

        return note

    handles = [module.register_forward_pre_hook(listen(layer)) for layer, module in enumerate(modules)]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()
