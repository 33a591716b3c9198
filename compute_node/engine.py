"""What an engine is: it turns requests into tokens on its own thread. Knows no text, no sockets, no queues of users."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeAlias

from compute_node.sampling import SampledToken, Sampling
from compute_node.step_ledger import Phase, RequestUse
from compute_node.token_constraint import TokenConstraint
from promoe.errors import PromoeError


class EngineKind(Enum):
    """Which engine serves the model."""

    CONTINUOUS = "continuous"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class EngineRequest:
    """Tokens in, and how to go on from them.

    Attributes:
        request_id: unique among open requests.
        prompt_ids: at least one token.
        max_tokens: tokens to draw at most, the ending one included.
        sampling: how to draw.
        stop_token_ids: tokens that end the answer (the model's own end of sequence among them unless ignored).
        constraint: which tokens may come; this request's own.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    constraint: TokenConstraint | None = None

    @property
    def is_plain_argmax(self) -> bool:
        """True when the model's own argmax is the whole answer, so that an engine need not look at the row."""
        return self.sampling.is_plain_argmax and self.constraint is None


class EndReason(Enum):
    """Why the engine stopped drawing."""

    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class RequestStarted:
    """The request is in a step for the first time. Times are of `time.perf_counter()`."""

    at_s: float


@dataclass(frozen=True)
class TokenDrawn:
    """One token of the answer; a token that ends the answer is not announced."""

    token: SampledToken
    at_s: float


@dataclass(frozen=True)
class RequestEnded:
    """The last event of a request that did not fail.

    Attributes:
        reason: why.
        stop_token_id: the token that ended it, with `STOP_TOKEN`.
        num_drawn: tokens drawn, the ending one included.
        use: what the request's tokens asked of the expert cache.
        at_s: when its last token was drawn, or when it was cancelled.
    """

    reason: EndReason
    stop_token_id: int | None
    num_drawn: int
    use: RequestUse
    at_s: float


@dataclass(frozen=True)
class RequestFailed:
    """The last event of a request whose step failed or whose engine died."""

    error: PromoeError


EngineEvent: TypeAlias = RequestStarted | TokenDrawn | RequestEnded | RequestFailed

EventSink: TypeAlias = Callable[[EngineEvent], None]
"""Called on the engine's thread, in order; must not block. Gets exactly one RequestEnded or RequestFailed, last."""

StepObserver: TypeAlias = Callable[[Phase, float], None]
"""Called on the engine's thread after each step: PREFILL when any prompt token was in it, and its seconds."""

DeathCallback: TypeAlias = Callable[[], None]
"""Called on the engine's thread, last, when it ends without having been stopped. No open request is left by then."""


class Engine(Protocol):
    """Runs many requests at once on its own thread. Methods may be called from any thread and do not block."""

    @property
    def kind(self) -> EngineKind:
        """Which one it is."""

    @property
    def max_request_tokens(self) -> int:
        """Prompt plus answer of one request at most, as far as its KV memory is concerned."""

    def start(self) -> None:
        """Starts the thread."""

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        """Takes the request; events come through `sink`.

        Raises:
            Unavailable: the engine has stopped or died.
        """

    def cancel(self, request_id: str) -> None:
        """Ends the request within one step, with `CANCELLED`; no effect when it has ended already."""

    def stop(self) -> None:
        """Fails what is open and ends the thread; blocks until it has ended. Idempotent."""
