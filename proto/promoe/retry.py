"""How often and how soon a call is tried again, within its deadline."""

import random
import time
from dataclasses import dataclass

from promoe.errors import DeadlineExceeded, Overloaded, PromoeError, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """Retries after `Unavailable` and `Overloaded`, the errors that time may mend.

    Attributes:
        max_attempts: tries in all; 1 never tries again.
        first_delay_s: pause before the second try; doubles each time.
        max_delay_s: longest pause of our own choice (a server may ask for more).
    """

    max_attempts: int = 4
    first_delay_s: float = 0.2
    max_delay_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; allowed: 1 or more")


class Attempts:
    """The tries of one call.

    Args:
        policy: see RetryPolicy.
        deadline_s: from now, over all tries and pauses.
    """

    def __init__(self, policy: RetryPolicy, deadline_s: float) -> None:
        if not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s}; allowed: above 0")
        self._policy = policy
        self._end_s = time.perf_counter() + deadline_s
        self._num_failed = 0

    @property
    def remaining_s(self) -> float:
        """What is left of the deadline; raises DeadlineExceeded when nothing is."""
        remaining_s = self._end_s - time.perf_counter()
        if remaining_s <= 0:
            raise DeadlineExceeded("The deadline passed before the call could be tried again.")
        return remaining_s

    def delay_after(self, error: PromoeError) -> float:
        """Seconds to pause before the next try, or raises `error` when there is no point in one."""
        self._num_failed += 1
        if not isinstance(error, Unavailable | Overloaded) or self._num_failed >= self._policy.max_attempts:
            raise error
        delay_s = min(self._policy.first_delay_s * 2.0 ** (self._num_failed - 1), self._policy.max_delay_s)
        if isinstance(error, Overloaded):
            delay_s = max(delay_s, error.retry_after_ms / 1000)
        # Callers that were refused together must not come back together.
        delay_s *= random.uniform(1.0, 1.25)
        if delay_s >= self._end_s - time.perf_counter():
            raise error
        return delay_s
