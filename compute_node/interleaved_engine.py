"""The engine for models whose cache Transformers' continuous batching cannot hold (latent or linear attention).

Requests take turns: each step is one request's forward pass with the KV cache object that `generate` would use.
A prompt is computed in one piece, as `generate` does it, so that tokens are equal: while it runs nobody else gets a
token, and its activations take memory in proportion to its length.
"""

import logging
import queue
import threading
from dataclasses import dataclass
from time import perf_counter
from typing import TypeAlias

import torch
from transformers import DynamicCache, PreTrainedModel

from compute_node.engine import (
    DeathCallback,
    EndReason,
    EngineKind,
    EngineRequest,
    EventSink,
    StepObserver,
)
from compute_node.running_request import STEP_FAILURES, RunningRequest, step_failure
from compute_node.sampling import SampledToken
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from promoe.errors import PromoeError, Unavailable
from promoe.request_id import about_answers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Submit:
    running: RunningRequest


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    """The thread ends before the next step."""


_Command: TypeAlias = _Submit | _Cancel | _Stop


@dataclass
class _Turn:
    """One request's place in the round: what its next step computes, on top of which KV cache.

    `next_ids` is the whole prompt first, then one token at a time; `num_cached` tokens were computed before.
    """

    running: RunningRequest
    next_ids: list[int]
    kv_cache: object
    num_cached: int = 0
    phase: Phase = Phase.PREFILL


class InterleavedEngine:
    """Requests take turns on one thread, step by step.

    Args:
        model: any causal LM; evaluated without gradients.
        ledger: told whose step runs.
        max_request_tokens: prompt plus answer of one request at most, from the memory plan.
        observe_step: told how long each step took.
        on_death: told when the thread ends without `stop`.

    ```
    submit ─► inbox ─► round: [ request a ][ request b ][ request c ][ request a ] …   (one step each)
    cancel ─► inbox ─────────┴ applied ───┴ between ──┴ two steps ─┘
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ledger: StepLedger,
        max_request_tokens: int,
        observe_step: StepObserver,
        on_death: DeathCallback,
    ) -> None:
        self._model = model.eval()
        self._ledger = ledger
        self._max_request_tokens = max_request_tokens
        self._observe_step = observe_step
        self._on_death = on_death
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._round: dict[str, _Turn] = {}
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self._thread = threading.Thread(target=self._run, name="interleaved-engine")

    @property
    def kind(self) -> EngineKind:
        """Interleaved requests."""
        return EngineKind.INTERLEAVED

    @property
    def max_request_tokens(self) -> int:
        """As planned."""
        return self._max_request_tokens

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, request: EngineRequest, sink: EventSink) -> None:
        """See `Engine.submit`."""
        assert request.prompt_ids, "an empty prompt was not refused"
        # Under the lock: what is in the inbox when the thread ends is failed by it, what comes later is refused.
        with self._lock:
            if self._refusal is not None:
                raise Unavailable(self._refusal)
            self._inbox.put(_Submit(RunningRequest(request, sink)))

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        self._inbox.put(_Cancel(request_id))

    def stop(self) -> None:
        """See `Engine.stop`."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join()

    def _run(self) -> None:
        stopped = False
        try:
            if self._model.device.type == "cuda":
                torch.cuda.set_device(self._model.device)
            self._take_turns()
            stopped = True
        finally:
            # A bug in a step ends up here, too, on its way to the thread's excepthook.
            what = "was shut down before the answer ended" if stopped else "has a dead engine; its log has the reason"
            self._fail_all(f"The compute node {what}.")
            if not stopped:
                logger.error("The engine died.")
                self._on_death()

    def _take_turns(self) -> None:
        """Runs steps until `_Stop`."""
        while self._apply_commands():
            request_id, turn = next(iter(self._round.items()))
            # To the end of the round before the step, which may take it out.
            self._round[request_id] = self._round.pop(request_id)
            self._step(turn)

    def _apply_commands(self) -> bool:
        """Applies what is in the inbox, waiting until there is a request; False to stop."""
        while not self._round or not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Submit):
                request = command.running.request
                assert request.request_id not in self._round, f"{request.request_id} is open already"
                turn = _Turn(command.running, list(request.prompt_ids), _new_kv_cache(self._model))
                self._round[request.request_id] = turn
            else:
                self._end(command.request_id, EndReason.CANCELLED)
        return True

    def _step(self, turn: _Turn) -> None:
        request_id = turn.running.request.request_id
        turn.running.start()
        self._ledger.begin_step([TokenSpan(request_id, len(turn.next_ids), turn.phase)])
        started_s = perf_counter()
        try:
            token = self._forward(turn)
        except STEP_FAILURES as error:
            logger.warning("A step of request %s failed: %s", request_id, error, extra=about_answers([request_id]))
            self._fail(request_id, step_failure(error))
            return
        finally:
            self._ledger.end_step()
            self._observe_step(turn.phase, perf_counter() - started_s)
        turn.phase = Phase.DECODE
        turn.next_ids = [token.token_id]
        reason = turn.running.accept(token)
        if reason is not None:
            self._end(request_id, reason, token.token_id if reason is EndReason.STOP_TOKEN else None)

    @torch.no_grad()
    def _forward(self, turn: _Turn) -> SampledToken:
        ids_1T = torch.tensor([turn.next_ids], device=self._model.device)
        num_tokens = turn.num_cached + len(turn.next_ids)
        # Positions are given as `generate` gives them: hybrids whose first layer has no keys cannot count them.
        positions_1T = torch.arange(turn.num_cached, num_tokens, device=self._model.device)[None]
        output = self._model(
            input_ids=ids_1T,
            position_ids=positions_1T,
            past_key_values=turn.kv_cache,
            use_cache=True,
            **_logits_at(len(turn.next_ids) - 1, self._model),
        )
        turn.num_cached = num_tokens
        # Families without a default cache class make their own at the first pass.
        turn.kv_cache = output.past_key_values
        logits_V = output.logits[0, -1].float()
        if turn.running.request.is_plain_argmax:
            return SampledToken(int(logits_V.argmax()))
        return turn.running.draw(logits_V)

    def _end(self, request_id: str, reason: EndReason, stop_token_id: int | None = None) -> None:
        turn = self._round.pop(request_id, None)
        if turn is not None:
            turn.running.end(reason, self._ledger.take(request_id), stop_token_id)

    def _fail(self, request_id: str, error: PromoeError) -> None:
        turn = self._round.pop(request_id)
        self._ledger.take(request_id)
        turn.running.fail(error)

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            self._refusal = reason
        for request_id in list(self._round):
            self._fail(request_id, Unavailable(reason))
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, _Submit):
                command.running.fail(Unavailable(reason))


def _new_kv_cache(model: PreTrainedModel) -> DynamicCache | None:
    """What `generate` starts with; None where the model makes its own."""
    # (PreTrainedModel, the only type that all causal LMs share, has GenerationMixin's methods through __getattr__.)
    if model._supports_default_dynamic_cache():  # type: ignore[operator]
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    return None


def _logits_at(row: int, model: PreTrainedModel) -> dict[str, torch.Tensor | int]:
    """Of the step's last row only.

    On a CPU as an index, which copies the row: on the slice that a number makes, its bfloat16 product with the
    vocabulary took 74 ms where it takes 4 on a copy (demo model, torch 2.13).
    """
    if not model._supports_logits_to_keep():  # type: ignore[operator]
        return {}
    return {"logits_to_keep": torch.tensor([row]) if model.device.type == "cpu" else 1}
