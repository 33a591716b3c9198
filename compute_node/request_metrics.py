"""What is measured about requests and steps, as Prometheus metrics; names by the glossary."""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from compute_node.step_ledger import Phase
from promoe import telemetry


class Outcome(Enum):
    """How a request ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REFUSED = "refused"
    FAILED = "failed"


class TokenKind(Enum):
    """Tokens that came in, and tokens that were drawn."""

    PROMPT = "prompt"
    OUTPUT = "output"


@dataclass
class TokenTimes:
    """Sums since the start, for live figures: a mean of the last seconds is the quotient of two differences.

    Attributes:
        num_first, ttft_s: requests that got their first token, and how long they waited for it, added up.
        num_next, next_s: further tokens, and the gaps before them, added up.
    """

    num_first: int = 0
    ttft_s: float = 0.0
    num_next: int = 0
    next_s: float = 0.0


_LONG_BUCKETS_S: Final = (*telemetry.LATENCY_BUCKETS_S, 120.0, 300.0)


class RequestMetrics:
    """Histograms, counters and gauges of one compute node.

    Args:
        registry: where they are registered; a second object on the same registry is an error.

    Attributes:
        token_times: sums of what the histograms are told.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=_LONG_BUCKETS_S)

        self.token_times = TokenTimes()
        self._ttft_s = histogram(telemetry.TTFT_SECONDS, "Arrival of a request to its first token")
        self._itl_s = histogram(telemetry.ITL_SECONDS, "Gap between two tokens of a request")
        self._tpot_s = histogram(telemetry.TPOT_SECONDS, "(End-to-end - TTFT) / (output tokens - 1) of a request")
        self._queue_s = histogram(telemetry.QUEUE_SECONDS, "Arrival of a request to its first step")
        self._step_s = histogram(telemetry.STEP_SECONDS, "One forward pass", ("phase",))
        self._tokens = Counter(telemetry.TOKENS, "Tokens of requests", ("kind",), registry=registry)
        self._requests = Counter(telemetry.REQUESTS, "Requests by outcome", ("outcome",), registry=registry)
        self._running = Gauge(telemetry.RUNNING_REQUESTS, "Requests the engine works on", registry=registry)
        self._queued = Gauge(telemetry.QUEUED_REQUESTS, "Requests that wait for the engine", registry=registry)
        for outcome in Outcome:
            self._requests.labels(outcome.value)
        for kind in TokenKind:
            self._tokens.labels(kind.value)

    def observe_step(self, phase: Phase, elapsed_s: float) -> None:
        """After each step, on the engine's thread; PREFILL when any prompt token was in it."""
        self._step_s.labels(phase.value).observe(elapsed_s)

    def observe_load(self, num_running: int, num_queued: int) -> None:
        """Whenever the number of open requests changes."""
        self._running.set(num_running)
        self._queued.set(num_queued)

    def observe_queue(self, queue_s: float) -> None:
        """When a request is in a step for the first time."""
        self._queue_s.observe(queue_s)

    def observe_first_token(self, ttft_s: float) -> None:
        """At the first token of a request."""
        self._ttft_s.observe(ttft_s)
        self.token_times.num_first += 1
        self.token_times.ttft_s += ttft_s

    def observe_next_token(self, itl_s: float) -> None:
        """At every further token of a request."""
        self._itl_s.observe(itl_s)
        self.token_times.num_next += 1
        self.token_times.next_s += itl_s

    def observe_tpot(self, tpot_s: float) -> None:
        """At the end of a request with at least two tokens."""
        self._tpot_s.observe(tpot_s)

    def count_tokens(self, kind: TokenKind, num_tokens: int) -> None:
        """Prompt tokens when a request is accepted, output tokens as they are drawn."""
        self._tokens.labels(kind.value).inc(num_tokens)

    def count_request(self, outcome: Outcome) -> None:
        """At the end of every request, refused ones included."""
        self._requests.labels(outcome.value).inc()
