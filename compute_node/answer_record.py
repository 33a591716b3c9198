"""An answer that is over: who asked, how it ended, and when what happened. Knows no words of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from compute_node.request_metrics import Outcome
from compute_node.step_ledger import RequestUse


@dataclass(frozen=True)
class AnswerTimes:
    """By `time.perf_counter()`, in this order; None where it did not come so far.

    Attributes:
        arrived_s: the request.
        started_s: the first step.
        first_s, last_s: tokens.
        ended_s: whoever asked has all of it, or has gone.
    """

    arrived_s: float
    started_s: float | None
    first_s: float | None
    last_s: float | None
    ended_s: float


@dataclass(frozen=True)
class AnswerRecord:
    """What is told of an answer when it is over.

    Attributes:
        answer_id: begins with the request's name.
        traceparent: the caller's span, as it came; empty for none.
        outcome: how it ended.
        num_prompt_tokens, num_output_tokens: how long it was.
        times: when.
        use: what it asked of the expert cache; None where it ended before the engine said so.
    """

    answer_id: str
    traceparent: str
    outcome: Outcome
    num_prompt_tokens: int
    num_output_tokens: int
    times: AnswerTimes
    use: RequestUse | None


AnswerListener: TypeAlias = Callable[[AnswerRecord], None]
"""Told of each answer on the event loop; must not block."""
