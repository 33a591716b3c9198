"""One request inside an engine: its sampler, what was drawn, and its events. Owned by the engine's thread."""

from time import perf_counter
from typing import Final

import torch

from compute_node.engine import (
    EndReason,
    EngineRequest,
    EventSink,
    RequestEnded,
    RequestFailed,
    RequestStarted,
    TokenDrawn,
)
from compute_node.sampling import RowSampler, SampledToken
from compute_node.step_ledger import RequestUse
from promoe.errors import PromoeError, ResourceExhausted

STEP_FAILURES: Final = (PromoeError, torch.OutOfMemoryError)
"""What may come out of a forward pass and ends only the requests in it; anything else is a bug and ends the engine."""


class RunningRequest:
    """Announces what happens to one request, each thing once and in order."""

    def __init__(self, request: EngineRequest, sink: EventSink) -> None:
        self.request = request
        self._sink = sink
        self._sampler: RowSampler | None = None
        self._started = False
        self._num_drawn = 0

    def start(self) -> None:
        """The request is in a step; only the first one is announced."""
        if not self._started:
            self._started = True
            self._sink(RequestStarted(perf_counter()))

    def draw(self, logits_V: torch.Tensor) -> SampledToken:
        """Draws from float32 logits of shape (V,); does not announce."""
        if self._sampler is None:
            request = self.request
            self._sampler = RowSampler(request.sampling, request.prompt_ids, request.constraint)
        return self._sampler.draw(logits_V)

    def accept(self, token: SampledToken) -> EndReason | None:
        """Counts the drawn token, announces it unless it ends the answer, and says whether this was the last one."""
        self._num_drawn += 1
        if token.token_id in self.request.stop_token_ids:
            return EndReason.STOP_TOKEN
        self._sink(TokenDrawn(token, perf_counter()))
        return EndReason.MAX_TOKENS if self._num_drawn >= self.request.max_tokens else None

    def end(self, reason: EndReason, use: RequestUse, stop_token_id: int | None = None) -> None:
        """The last event."""
        self._sink(RequestEnded(reason, stop_token_id, self._num_drawn, use, perf_counter()))

    def fail(self, error: PromoeError) -> None:
        """The last event, instead of `end`."""
        self._sink(RequestFailed(error))


def step_failure(error: PromoeError | torch.OutOfMemoryError) -> PromoeError:
    """What the requests of a failed step are told."""
    if isinstance(error, PromoeError):
        return error
    return ResourceExhausted(f"The device ran out of memory in this request's step: {str(error).splitlines()[0]}")
