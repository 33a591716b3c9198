"""What an answer must look like, enforced token by token: grammars compiled by llguidance against the tokenizer.

Shape suffixes: V vocabulary.
"""

import asyncio
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compute_node.token_constraint import TokenConstraint
from promoe.errors import InternalError

if TYPE_CHECKING:
    # Imported where a grammar is asked for: nodes that never see one need not have it.
    from llguidance import LLMatcher, LLTokenizer

_SILENT: Final = 0

_MAX_COMPLAINT_CHARS: Final = 300

_WHITE_SPACE: Final = r"[ \n\r\t]{0,64}"
"""Bounded: a model that is lost would else go on with white space for ever, which JSON allows."""


@dataclass(frozen=True)
class AnswerGrammar:
    """A grammar, as llguidance reads it.

    Attributes:
        text: its source.
        field: what the caller calls it, for errors.
    """

    text: str
    field: str

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, object], field: str) -> "AnswerGrammar":
        """JSON that the schema allows; `{"type": "object"}` is any object."""
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": _WHITE_SPACE}
            )
        except ValueError as error:
            raise ValueError(f"{field} cannot be enforced: {_sentence(str(error))}") from error
        return cls(text, field)

    @classmethod
    def of_lark(cls, lark: str, field: str) -> "AnswerGrammar":
        """See llguidance's documentation of its Lark dialect."""
        from llguidance import LLMatcher

        return cls(LLMatcher.grammar_from_lark(lark), field)


class GrammarCompiler:
    """Makes constraints of grammars. The tokenizer is prepared at the first use, which takes a second.

    Args:
        tokenizer: the model's own.
        vocab_size: rows of the model's embedding.
        eos_token_ids: what may come when the grammar is satisfied.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._prepared: LLTokenizer | None = None
        self._lock = threading.Lock()

    async def compile(self, grammar: AnswerGrammar, num_answers: int) -> list[TokenConstraint]:
        """One constraint for each answer.

        Raises:
            ValueError: the grammar is none, or asks for what llguidance does not support; or this tokenizer is not one
                that grammars can be matched with.
        """
        matcher = await asyncio.to_thread(self._compile, grammar)
        return [_GrammarConstraint(matcher.deep_copy()) for _ in range(num_answers)]

    def _compile(self, grammar: AnswerGrammar) -> "LLMatcher":
        from llguidance import LLMatcher

        tokenizer = self._prepare(grammar.field)
        complaint = LLMatcher.validate_grammar(grammar.text, tokenizer)
        if complaint and not complaint.startswith("WARNING"):
            raise ValueError(f"{grammar.field} cannot be enforced: {_sentence(complaint)}")
        matcher = LLMatcher(tokenizer, grammar.text, log_level=_SILENT)
        if matcher.is_error():
            raise ValueError(f"{grammar.field} cannot be enforced: {_sentence(matcher.get_error())}")
        return matcher

    def _prepare(self, field: str) -> "LLTokenizer":
        from llguidance.hf import from_tokenizer

        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._eos_token_ids:
            raise ValueError(f"{field} cannot be enforced with this model's tokenizer")
        with self._lock:
            if self._prepared is None:
                eos = sorted(self._eos_token_ids)
                self._prepared = from_tokenizer(self._tokenizer, self._vocab_size, eos)
            return self._prepared


def _sentence(complaint: str) -> str:
    """In one line: what is wrong with a pattern is in the last of several."""
    text = " ".join(complaint.split())
    return text if len(text) <= _MAX_COMPLAINT_CHARS else f"{text[:_MAX_COMPLAINT_CHARS]}…"


class _GrammarConstraint:
    """One answer's place in its grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def forbid(self, scores_V: torch.Tensor) -> torch.Tensor:
        """See TokenConstraint."""
        allowed = self._matcher.compute_logit_bias()
        self._check()
        allowed_V = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)[: scores_V.shape[0]] != 0
        return scores_V.masked_fill(~allowed_V.to(scores_V.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """See TokenConstraint."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InternalError(f"The answer's grammar cannot go on: {self._matcher.get_error().splitlines()[0]}")
