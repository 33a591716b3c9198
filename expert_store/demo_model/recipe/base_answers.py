"""Step 2: chat answers sampled from the base model itself, as text to calibrate and distil on."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from expert_store.demo_model.tokenizer_files import END_OF_TURN_ID

# fmt: off
_HEROES = (
    "fox", "lighthouse keeper", "lost robot", "queen", "baker", "dragon", "fisherman", "wizard",
    "ship captain", "painter", "shepherd", "detective",
)
_THEMES = (
    "honesty", "a storm", "a hidden door", "the sea", "a stolen ring", "winter", "a secret letter",
    "an unlikely friend", "a broken promise",
)
_TOPICS = (
    "gravity", "the internet", "democracy", "the Roman Empire", "vaccines", "money", "the water cycle",
    "volcanoes", "sleep", "music", "electricity", "whales", "poetry", "memory", "a steam engine", "language",
    "chess", "the heart", "glass", "honey bees",
)
# fmt: on
_QUESTIONS = (
    "Explain how {} works in simple words.",
    "What is {} and why does it matter?",
    "Give me three facts about {}.",
    "Write a short essay about {}.",
    "Give me advice on {}.",
    "Write a letter to a friend about {}.",
    "Describe {} to a child.",
)
_CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class SampleSettings:
    """How many answers, and how they are drawn."""

    num_answers: int = 6000
    batch_size: int = 64
    max_new_tokens: int = 220
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0


def write_answers(model: LlamaForCausalLM, tokenizer: Tokenizer, path: Path, settings: SampleSettings) -> None:
    """Append `settings.num_answers` lines {"ids": prompt and answer} to the JSON-lines file `path`."""
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    with path.open("a") as file:
        for first in range(0, settings.num_answers, settings.batch_size):
            size = min(settings.batch_size, settings.num_answers - first)
            prompts = [tokenizer.encode(_CHAT.format(_prompt(rng))).ids for _ in range(size)]
            for ids in _answers(model, prompts, settings):
                file.write(json.dumps({"ids": ids}) + "\n")
            file.flush()


def _prompt(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return f"Write a short story about a {rng.choice(_HEROES)} and {rng.choice(_THEMES)}."
    return rng.choice(_QUESTIONS).format(rng.choice(_TOPICS))


def _answers(model: LlamaForCausalLM, prompts: list[list[int]], settings: SampleSettings) -> Iterator[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[END_OF_TURN_ID] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Transformers types generate's `self` as a protocol that its own models do not meet.
    output = model.generate(  # type: ignore[misc]
        ids,
        attention_mask=mask,
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
    )
    assert isinstance(output, torch.Tensor), "generate returns token ids unless asked for more"
    for prompt, answer in zip(prompts, output[:, width:].tolist(), strict=True):
        end = answer.index(END_OF_TURN_ID) + 1 if END_OF_TURN_ID in answer else len(answer)
        yield prompt + answer[:end]
