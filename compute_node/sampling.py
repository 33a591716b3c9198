"""How one row of logits becomes a token: the request's parameters, its random numbers, log probabilities.

Shape suffixes: V vocabulary. Both engines sample through here, so that the same seed gives the same answer on both.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compute_node.logit_offsets import LogitOffsets, check_offsets
from compute_node.token_constraint import TokenConstraint
from promoe.errors import InternalError

# Logits divided by less than these could leave float32's range: one request's numbers would fail the whole step.
MIN_TEMPERATURE: Final = 1e-5
MIN_REPETITION_PENALTY: Final = 0.01
MAX_TEMPERATURE: Final = 5.0
MAX_REPETITION_PENALTY: Final = 5.0
MAX_TOP_LOGPROBS: Final = 20
MAX_SEED: Final = 2**64 - 1

_DRAWN_SEED_BITS: Final = 32
"""A seed that a person can read off and type again."""


def draw_seed() -> int:
    """For a request that brings none."""
    return secrets.randbits(_DRAWN_SEED_BITS)


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn; the defaults are greedy decoding without log probabilities.

    Attributes:
        temperature: 0 is greedy.
        top_k: draw from the k most likely tokens; None: from all.
        top_p: draw from the smallest set of tokens with this probability mass.
        seed: start of the request's own random numbers.
        repetition_penalty: divides (or multiplies) the logits of tokens that are in the prompt or the answer.
        top_logprobs: alternatives to report with each token's log probability; None: no log probabilities.
        presence_penalty: subtracted from the logits of tokens that are in the answer.
        frequency_penalty: subtracted from a token's logit for each time it is in the answer.
        logit_bias: added to the logits, by token.

    Raises:
        ValueError: a value out of range; the text names field, value and range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    top_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 to {MAX_TEMPERATURE}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 (greedy), or {MIN_TEMPERATURE:g} and more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; allowed: 1 or more, or absent for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: above 0, up to 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to {MAX_SEED}")
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; allowed: {MIN_REPETITION_PENALTY} to "
                f"{MAX_REPETITION_PENALTY}"
            )
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; allowed: 0 to {MAX_TOP_LOGPROBS}")
        check_offsets(self.logit_bias, self.presence_penalty, self.frequency_penalty)

    @property
    def is_greedy(self) -> bool:
        """True when the most likely token (after penalties and bias) is always taken."""
        return self.temperature == 0

    @property
    def is_plain_argmax(self) -> bool:
        """True when the model's own argmax is the whole answer, so that an engine need not look at the row."""
        return (
            self.is_greedy
            and self.repetition_penalty == 1
            and self.top_logprobs is None
            and self.presence_penalty == self.frequency_penalty == 0
            and not self.logit_bias
        )


@dataclass(frozen=True)
class Alternative:
    """A token and the natural logarithm of the model's own probability for it."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class SampledToken:
    """The token that was drawn.

    Attributes:
        token_id: the token.
        logprob: before temperature, penalty and filters; None unless the request asked for it.
        alternatives: the most likely tokens, best first.
    """

    token_id: int
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()


class RowSampler:
    """Draws one request's tokens, one row of logits after the other.

    The filters are the classes that `generate` uses, in its order; after its repetition penalty come presence and
    frequency penalties and the bias, then what a constraint forbids. The draw inverts the cumulative distribution at
    one number of the request's own CPU generator: no other request, batch or device can shift its random numbers.

    Args:
        sampling: the request's parameters.
        prompt_ids: tokens that the repetition penalty has seen before the first draw.
        constraint: which tokens may come; None: all.
    """

    def __init__(
        self, sampling: Sampling, prompt_ids: Sequence[int], constraint: TokenConstraint | None = None
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._offsets = LogitOffsets(sampling.logit_bias, sampling.presence_penalty, sampling.frequency_penalty)
        self._repetition = _repetition(sampling)
        self._filters = _filters(sampling)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        # The penalty depends on which tokens were seen, not how often: a set stays small in long answers.
        self._seen = set(prompt_ids) if sampling.repetition_penalty != 1 else set()
        self._seen_ids_1S = torch.tensor([sorted(self._seen)], dtype=torch.long)

    def draw(self, logits_V: torch.Tensor) -> SampledToken:
        """Draws the next token from float32 logits of shape (V,), which are left as they are.

        Raises:
            InternalError: the logits are not numbers.
        """
        self._seen_ids_1S = self._seen_ids_1S.to(logits_V.device)
        seen_ids_1S: torch.LongTensor = self._seen_ids_1S  # type: ignore[assignment]
        scores_V: torch.Tensor = self._repetition(seen_ids_1S, logits_V[None])[0]
        scores_V = self._offsets.add_to(scores_V)
        if self._constraint is not None:
            scores_V = self._constraint.forbid(scores_V)
        scores_V = self._filters(seen_ids_1S, scores_V[None])[0]
        token_id = int(scores_V.argmax()) if self._sampling.is_greedy else self._invert(scores_V)
        self._remember(token_id)
        if self._sampling.top_logprobs is None:
            return SampledToken(token_id)
        return _with_logprobs(logits_V, token_id, self._sampling.top_logprobs)

    def _invert(self, scores_V: torch.Tensor) -> int:
        # In float64: a float32 running sum over a large vocabulary would move borders by more than rare tokens weigh.
        cumulative_V = torch.softmax(scores_V, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        uniform = torch.rand(1, generator=self._generator, dtype=torch.float64).to(scores_V.device)
        index = torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True)
        # Rounding may put the target on the very end, past the last token that has any probability.
        last = torch.searchsorted(cumulative_V, cumulative_V[-1:])
        drawn, total = torch.cat((torch.minimum(index, last).double(), cumulative_V[-1:])).tolist()
        if not math.isfinite(total):
            raise InternalError("The model's logits are not numbers, so no token can be drawn from them.")
        return int(drawn)

    def _remember(self, token_id: int) -> None:
        self._offsets.count(token_id)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        if self._sampling.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            new_id_11 = self._seen_ids_1S.new_tensor([[token_id]])
            self._seen_ids_1S = torch.cat((self._seen_ids_1S, new_id_11), dim=1)


def _repetition(sampling: Sampling) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    return processors


def _filters(sampling: Sampling) -> LogitsProcessorList:
    """The order of `GenerationMixin._get_logits_processor`."""
    processors = LogitsProcessorList()
    if sampling.is_greedy:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def _with_logprobs(logits_V: torch.Tensor, token_id: int, num_alternatives: int) -> SampledToken:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    best = torch.topk(logprobs_V, min(num_alternatives, logprobs_V.shape[0]))
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return SampledToken(
        token_id, float(logprobs_V[token_id]), tuple(Alternative(index, logprob) for index, logprob in alternatives)
    )
