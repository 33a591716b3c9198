"""Step 4: trains the student against the dense base and measures both on held-out text.

Loss: KL of the logits + relative error of hidden states (last layer, every third before it) + 0.002 load balance.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from transformers import LlamaForCausalLM

from expert_store.demo_model.recipe.student import routed_ffns
from expert_store.demo_model.recipe.text_blocks import TextBlocks

_LOAD_BALANCE_WEIGHT = 0.002
_COMPARE_EVERY = 3
_ROUTER_LR, _LORA_LR, _NORM_LR = 1e-3, 2e-3, 3e-4
_WARM_UP_STEPS, _LAST_LR_SHARE = 10, 0.02


@dataclass(frozen=True)
class DistilSettings:
    """How much text: `num_steps` batches of `batch_size` blocks. The defaults are the shipped delta's 1.23 M tokens."""

    num_steps: int = 600
    batch_size: int = 8
    seed: int = 0


def distil(
    teacher: LlamaForCausalLM,
    student: LlamaForCausalLM,
    blocks: TextBlocks,
    settings: DistilSettings,
    report: Callable[[str], None],
) -> None:
    """Train the student in place; `report` gets a line now and then. A quarter of each batch is the Bible."""
    optimizer = _optimizer(student)
    start_s = time.perf_counter()
    for step, batch in enumerate(_batches(blocks, settings)):
        warm_up, decay = min(1.0, (step + 1) / _WARM_UP_STEPS), max(_LAST_LR_SHARE, 1 - step / settings.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * warm_up * decay
        kl, hidden_error, load_balance = losses(teacher, student, batch)
        loss = kl + hidden_error + _LOAD_BALANCE_WEIGHT * load_balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            tokens_per_s = (step + 1) * batch.numel() / (time.perf_counter() - start_s)
            report(
                f"step {step}  kl {kl.item():.3f}  hidden {hidden_error.item():.3f}  "
                f"balance {load_balance.item():.3f}  {tokens_per_s:.0f} tokens/s"
            )


def losses(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL per token, relative squared error of compared hidden states, and load balance, each a scalar."""
    with torch.no_grad(), _layer_outputs(teacher) as expected:
        expected_logits = teacher(batch, use_cache=False).logits.float().log_softmax(-1)
    with _layer_outputs(student) as found:
        logits = student(batch, use_cache=False).logits.float().log_softmax(-1)
    kl = (expected_logits.exp() * (expected_logits - logits)).sum(-1).mean()
    errors = [
        ((a.float() - b.float()).pow(2).sum(-1) / b.float().pow(2).sum(-1)).mean()
        for a, b in zip(found, expected, strict=True)
    ]
    balances = [ffn.load_balance for ffn in routed_ffns(student)]
    return kl, torch.stack(errors).mean(), torch.stack(balances).mean()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, blocks_NT: torch.Tensor) -> float:
    """Perplexity over whole blocks; 8 x 256 tokens tell it to about 5%."""
    losses_of_batches = []
    for batch in blocks_NT.split(4):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        losses_of_batches.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses_of_batches).mean().item())


def _optimizer(student: LlamaForCausalLM) -> torch.optim.Optimizer:
    rates = {"router": _ROUTER_LR, "lora": _LORA_LR, "norm": _NORM_LR}
    groups = []
    for kind, rate in rates.items():
        params = [p for name, p in student.named_parameters() if p.requires_grad and kind in name]
        groups.append({"params": params, "lr": rate, "full_lr": rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _batches(blocks: TextBlocks, settings: DistilSettings) -> Iterator[torch.Tensor]:
    rng = random.Random(settings.seed)
    num_bible = max(1, settings.batch_size // 4)
    for _ in range(settings.num_steps):
        bible = torch.tensor([rng.randrange(len(blocks.bible)) for _ in range(num_bible)])
        answers = torch.tensor([rng.randrange(len(blocks.answers)) for _ in range(settings.batch_size - num_bible)])
        yield torch.cat([blocks.bible[bible], blocks.answers[answers]])


@contextmanager
def _layer_outputs(model: LlamaForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Collects the hidden states after the last and every third layer before it, of the forward passes made inside."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        for layer in list(model.model.layers)[::-_COMPARE_EVERY]
    ]
    yield outputs
    for hook in hooks:
        hook.remove()
