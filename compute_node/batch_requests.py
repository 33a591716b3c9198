"""The open requests of the continuous engine: what happens to them when a step starts, draws, delivers or fails.

All but `add`, `ask_to_cancel` and `refuse` run on the engine's thread.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Final

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestStatus

from compute_node.engine import EndReason, EngineRequest, EventSink
from compute_node.running_request import RunningRequest
from compute_node.sampling import SampledToken
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from promoe.errors import InternalError, PromoeError, Unavailable
from promoe.request_id import about_answers

logger = logging.getLogger(__name__)

_STEP_FAILED: Final = "The engine failed in a step of this request; the compute node's log has the reason."


class BatchRequests:
    """Requests from `add` to their last event.

    State of a request:
    ```
    add ─► waits for its first step ─► in steps ─► ended | failed
             └──────── asked to cancel ────┘─► ended, between two steps
    ```
    """

    def __init__(self, ledger: StepLedger) -> None:
        self._ledger = ledger
        self._open: dict[str, RunningRequest] = {}
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self._drawn: dict[str, SampledToken] = {}
        self._cancels: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._undrawn: list[str] = []

    def add(self, request: EngineRequest, sink: EventSink) -> None:
        """From any thread; raises Unavailable after `refuse`."""
        with self._lock:
            if self._refusal is not None:
                raise Unavailable(self._refusal)
            assert request.request_id not in self._open, f"{request.request_id} is open already"
            self._open[request.request_id] = RunningRequest(request, sink)

    def ask_to_cancel(self, request_id: str) -> None:
        """From any thread; `take_cancelled` ends it."""
        self._cancels.put(request_id)

    def refuse(self, reason: str) -> None:
        """From any thread: no request can be added from now on, and what Transformers fails fails for this reason."""
        with self._lock:
            self._refusal = reason

    def fail_all(self) -> None:
        """After `refuse`: fails what is open, when the thread has ended or as its last act."""
        assert self._refusal is not None, "requests may still be added"
        for request_id in list(self._open):
            self._fail(request_id, Unavailable(self._refusal))

    def take_cancelled(self) -> list[str]:
        """Between two steps: ends the requests whose cancellation has come.

        Names those that the batch must go on without: the ended ones, and those whose draw failed.
        """
        cancelled, self._undrawn = self._undrawn, []
        while True:
            try:
                request_id = self._cancels.get_nowait()
            except queue.Empty:
                return cancelled
            running = self._close(request_id)
            if running is not None:
                cancelled.append(request_id)
                running.end(EndReason.CANCELLED, self._ledger.take(request_id))

    def begin_step(self, states: Sequence[FutureRequestState]) -> Phase:
        """Announces the rows of the step; returns the phase its time counts for."""
        spans = [_span(state) for state in states]
        for span in spans:
            running = self._open.get(span.request_id)
            if running is not None:
                running.start()
        self._ledger.begin_step(spans)
        return Phase.PREFILL if any(span.phase is Phase.PREFILL for span in spans) else Phase.DECODE

    def end_step(self) -> None:
        """The forward pass is over, well or not."""
        self._ledger.end_step()

    def draw(self, request_id: str, logits_V: torch.Tensor) -> SampledToken | None:
        """Draws one request's token from its row, or None when the row's own argmax is the token."""
        running = self._open.get(request_id)
        if running is None or running.request.is_plain_argmax:
            return None
        try:
            token = running.draw(logits_V)
        except PromoeError as error:
            # Its neighbours' rows are none of its business: what the batch makes of this one is nobody's.
            self._fail(request_id, error)
            self._undrawn.append(request_id)
            return None
        self._drawn[request_id] = token
        return token

    def deliver(self, output: GenerationOutput) -> None:
        """One more token of a request, or its failure."""
        running = self._open.get(output.request_id)
        if running is None:
            return
        if output.status == RequestStatus.FAILED:
            refusal = self._refusal
            error = InternalError(_STEP_FAILED) if refusal is None else Unavailable(refusal)
            self._fail(output.request_id, error)
            return
        token_id = int(output.generated_tokens[-1])
        token = self._drawn.pop(output.request_id, None) or SampledToken(token_id)
        assert token.token_id == token_id, f"drew token {token.token_id}, but the batch went on with {token_id}"
        reason = running.accept(token)
        assert (reason is not None) == output.is_finished(), "the engine and Transformers disagree on the last token"
        if reason is not None:
            self._close(output.request_id)
            stop_token_id = token_id if reason is EndReason.STOP_TOKEN else None
            running.end(reason, self._ledger.take(output.request_id), stop_token_id)

    def fail_step(self, states: Sequence[FutureRequestState], error: PromoeError) -> None:
        """Fails the requests of the step that raised `error`."""
        request_ids = [state.state.request_id for state in states]
        logger.warning("A step of %d requests failed: %s", len(states), error, extra=about_answers(request_ids))
        for request_id in request_ids:
            self._fail(request_id, error)

    def _close(self, request_id: str) -> RunningRequest | None:
        self._drawn.pop(request_id, None)
        with self._lock:
            return self._open.pop(request_id, None)

    def _fail(self, request_id: str, error: PromoeError) -> None:
        running = self._close(request_id)
        self._ledger.take(request_id)
        if running is not None:
            running.fail(error)


def _span(future: FutureRequestState) -> TokenSpan:
    # A request that lost its KV blocks to others computes its own answer's tokens again: that is prefill, too.
    is_decode = future.query_length == 1 and future.state.generated_len() > 0
    return TokenSpan(future.state.request_id, future.query_length, Phase.DECODE if is_decode else Phase.PREFILL)
