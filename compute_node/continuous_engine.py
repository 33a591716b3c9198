"""The engine over Transformers' continuous batching: paged KV, chunked prefill, prefix sharing."""

import logging
import threading
from typing import Final

from transformers import PreTrainedModel

from compute_node.batch_loop import KV_BLOCK_TOKENS, BatchLimits, build_batch_loop
from compute_node.batch_requests import BatchRequests
from compute_node.engine import DeathCallback, EngineKind, EngineRequest, EventSink, StepObserver
from compute_node.step_ledger import StepLedger

logger = logging.getLogger(__name__)

_STOP_DEADLINE_S: Final = 60.0


class ContinuousEngine:
    """Requests of any length join and leave one batch at every step.

    Args:
        model: any causal LM whose attention the paged KV can hold; evaluated without gradients.
        ledger: told who is in each step.
        limits: what one step may hold.
        observe_step: told how long each step took.
        on_death: told when the thread ends without `stop`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ledger: StepLedger,
        limits: BatchLimits,
        observe_step: StepObserver,
        on_death: DeathCallback,
    ) -> None:
        self._model = model
        self._limits = limits
        self._on_death = on_death
        self._stopping = threading.Event()
        self._attention = model.config._attn_implementation
        self._requests = BatchRequests(ledger)
        self._loop = build_batch_loop(model, limits)
        self._loop.attach(self._requests, observe_step, self._thread_ended)

    @property
    def kind(self) -> EngineKind:
        """Continuous batching."""
        return EngineKind.CONTINUOUS

    @property
    def max_request_tokens(self) -> int:
        """One request may use all KV blocks."""
        return self._limits.num_kv_blocks * KV_BLOCK_TOKENS

    @property
    def fatal_error(self) -> BaseException | None:
        """What ended the thread, if it died."""
        error: BaseException | None = self._loop.background_thread_status.fatal_error
        return error

    def start(self) -> None:
        """Starts the thread, which allocates the KV blocks first."""
        self._loop.start()

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        """See `Engine.submit`."""
        num_tokens = len(request.prompt_ids) + request.max_tokens
        assert request.prompt_ids, "an empty prompt was not refused"
        assert num_tokens <= self.max_request_tokens, "a request longer than the KV memory was not refused"
        self._requests.add(request, sink)
        self._loop.add_request(
            list(request.prompt_ids),
            request_id=request.request_id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(request.stop_token_ids),
        )

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._requests.ask_to_cancel(request_id)

    def stop(self) -> None:
        """See `Engine.stop`."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._requests.refuse("The compute node was shut down before the answer ended.")
        if self._loop.is_running():
            self._loop.stop(block=True, timeout=_STOP_DEADLINE_S, hard_stop=True)
        self._requests.fail_all()
        self._model.set_attn_implementation(self._attention)

    def _thread_ended(self) -> None:
        if self._stopping.is_set():
            return
        logger.error("The engine died: %s", self.fatal_error)
        self._requests.refuse("The engine of this compute node died; its log has the reason.")
        self._requests.fail_all()
        self._on_death()
