"""A second implementation of the engine's seam, for tests that need to say when each thing happens."""

from time import perf_counter

from compute_node.engine import (
    EndReason,
    EngineKind,
    EngineRequest,
    EventSink,
    RequestEnded,
    RequestFailed,
    TokenDrawn,
)
from compute_node.sampling import SampledToken
from compute_node.step_ledger import RequestUse
from promoe.errors import PromoeError


class HandEngine:
    """An engine whose steps are the test's own calls."""

    kind = EngineKind.INTERLEAVED
    max_request_tokens = 100

    def __init__(self) -> None:
        self.running: dict[str, EventSink] = {}
        self.refusal: PromoeError | None = None
        self.max_running = 0
        self.num_drawn = 0

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.running[request.request_id] = sink
        self.max_running = max(self.max_running, len(self.running))

    def cancel(self, request_id: str) -> None:
        if request_id in self.running:
            self.end(request_id, EndReason.CANCELLED)

    def draw(self, request_id: str, *token_ids: int) -> None:
        """The request's next tokens."""
        for token_id in token_ids:
            self.num_drawn += 1
            self.running[request_id](TokenDrawn(SampledToken(token_id), perf_counter()))

    def end(self, request_id: str, reason: EndReason = EndReason.MAX_TOKENS, stop_token_id: int | None = None) -> None:
        """The request's last event."""
        ended = RequestEnded(reason, stop_token_id, self.num_drawn, RequestUse(), perf_counter())
        self.running.pop(request_id)(ended)

    def fail(self, request_id: str, error: PromoeError) -> None:
        """The request's last event, if it fails."""
        self.running.pop(request_id)(RequestFailed(error))
