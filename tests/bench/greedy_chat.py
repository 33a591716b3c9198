"""One greedy answer at batch 1 by plain forward passes, each announced to the ledger as an engine would."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import DynamicCache, PreTrainedModel

from compute_node.step_ledger import Phase, StepLedger, TokenSpan


@dataclass(frozen=True)
class ChatRun:
    """What was answered, and how long each step took."""

    token_ids: tuple[int, ...]
    prefill_s: float
    decode_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""
        return sum(self.decode_s) / len(self.decode_s)


@torch.inference_mode()
def run_chat(
    model: PreTrainedModel,
    ledger: StepLedger,
    prompt_ids: list[int],
    num_tokens: int,
    after_prefill: Callable[[], None] = lambda: None,
) -> ChatRun:
    """Answers with so many tokens, end-of-sequence or not; at least two."""
    kv_cache = DynamicCache(config=model.config)
    request_id = f"chat-{ledger.step + 1}"
    answer: list[int] = []
    seconds: list[float] = []
    ids, num_cached = prompt_ids, 0
    while len(answer) < num_tokens:
        phase = Phase.DECODE if num_cached else Phase.PREFILL
        started_s = perf_counter()
        ledger.begin_step([TokenSpan(request_id, len(ids), phase)])
        output = model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.arange(num_cached, num_cached + len(ids), device=model.device)[None],
            past_key_values=kv_cache,
            use_cache=True,
            # An index, as the engines give it: a slice takes a slow way through the vocabulary.
            logits_to_keep=torch.tensor([len(ids) - 1], device=model.device),
        )
        answer.append(int(output.logits[0, -1].argmax()))
        ledger.end_step()
        seconds.append(perf_counter() - started_s)
        if num_cached == 0:
            after_prefill()
        num_cached += len(ids)
        ids = answer[-1:]
    ledger.take(request_id)
    return ChatRun(tuple(answer), seconds[0], tuple(seconds[1:]))
