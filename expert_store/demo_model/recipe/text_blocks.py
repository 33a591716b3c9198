"""The recipe's texts as blocks of token ids, split by document into training and held-out ones."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from expert_store.demo_model.recipe.corpus import CHAPTER_SEPARATOR
from promoe.errors import ModelNotFound

_HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class TextBlocks:
    """Blocks [N, T] of token ids by source."""

    bible: torch.Tensor
    answers: torch.Tensor


def load_blocks(work_dir: Path, tokenizer: Tokenizer, block_length: int, *, held_out: bool) -> TextBlocks:
    """The blocks of every 20th document (`held_out`) or of all others; ModelNotFound without text."""
    corpus_path, answers_path = work_dir / "web.txt", work_dir / "answers.jsonl"
    for path in (corpus_path, answers_path):
        if not path.is_file():
            raise ModelNotFound(f"there is no {path}: run the steps before this one first")
    newline = tokenizer.encode("\n").ids
    chapters = corpus_path.read_text().split(CHAPTER_SEPARATOR)
    answer_ids = [json.loads(line)["ids"] + newline for line in answers_path.read_text().splitlines()]
    chapter_ids = [encoding.ids + newline for encoding in tokenizer.encode_batch(chapters)]
    bible = _blocks(_part(chapter_ids, held_out), block_length)
    answers = _blocks(_part(answer_ids, held_out), block_length)
    if not (len(bible) and len(answers)):
        raise ModelNotFound(
            f"{work_dir} holds less text than one block of {block_length} tokens: make more of it first"
        )
    return TextBlocks(bible, answers)


def _part(documents: list[list[int]], held_out: bool) -> list[list[int]]:
    return [ids for i, ids in enumerate(documents) if (i % _HELD_OUT_EVERY == 0) == held_out]


def _blocks(documents: list[list[int]], length: int) -> torch.Tensor:
    stream = [token_id for document in documents for token_id in document]
    return torch.tensor(stream[: len(stream) // length * length], dtype=torch.long).view(-1, length)
