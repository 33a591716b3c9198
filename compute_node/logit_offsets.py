"""What is added to a request's logits before each draw: its bias, and its penalties on what it has drawn.

Shape suffixes: V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch

MAX_LOGIT_BIAS: Final = 100.0
MAX_BIASED_TOKENS: Final = 1024
MAX_COUNT_PENALTY: Final = 2.0


class LogitOffsets:
    """One request's offsets: `bias - presence - frequency x count` of every token it has drawn, else its bias.

    The formula of OpenAI's API reference: tokens of the prompt are not counted, the answer's own are.

    Args:
        bias: by token.
        presence_penalty: for having been drawn at all.
        frequency_penalty: for each time.
    """

    def __init__(self, bias: Mapping[int, float], presence_penalty: float, frequency_penalty: float) -> None:
        self._bias = bias
        self._presence_penalty = presence_penalty
        self._frequency_penalty = frequency_penalty
        self._counts: dict[int, int] = {}
        self._offset_V: torch.Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """True when no logit is ever changed."""
        return not self._bias and not self._has_penalty

    @property
    def _has_penalty(self) -> bool:
        return self._presence_penalty != 0 or self._frequency_penalty != 0

    def add_to(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Scores of shape (V,) with the offsets; a new tensor unless there are none."""
        if self.is_nothing:
            return scores_V
        if self._offset_V is None:
            self._offset_V = torch.zeros_like(scores_V)
            for token_id in self._bias:
                self._offset_V[token_id] = self._offset_of(token_id)
        return scores_V + self._offset_V

    def count(self, token_id: int) -> None:
        """The token was drawn."""
        if self._has_penalty:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            if self._offset_V is not None:
                self._offset_V[token_id] = self._offset_of(token_id)

    def _offset_of(self, token_id: int) -> float:
        """From the count, not from the former offset: rounding does not add up over a long answer."""
        count = self._counts.get(token_id, 0)
        presence = self._presence_penalty if count else 0.0
        return self._bias.get(token_id, 0.0) - presence - self._frequency_penalty * count


def check_offsets(bias: Mapping[int, float], presence_penalty: float, frequency_penalty: float) -> None:
    """Raises ValueError for a value out of range, naming field, value and range."""
    if len(bias) > MAX_BIASED_TOKENS:
        raise ValueError(f"logit_bias has {len(bias)} entries; allowed: at most {MAX_BIASED_TOKENS}")
    for token_id, offset in bias.items():
        if not math.isfinite(offset) or abs(offset) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias of token {token_id} is {offset}; allowed: -{MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
            )
    for name, penalty in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
        if not abs(penalty) <= MAX_COUNT_PENALTY:
            raise ValueError(f"{name} is {penalty}; allowed: -{MAX_COUNT_PENALTY:g} to {MAX_COUNT_PENALTY:g}")
