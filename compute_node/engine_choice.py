"""Which engine serves the model, decided at load by trying one token."""

import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedModel

from compute_node.batch_loop import BatchLimits
from compute_node.config import EngineChoice
from compute_node.continuous_engine import ContinuousEngine
from compute_node.engine import (
    DeathCallback,
    Engine,
    EngineEvent,
    EngineRequest,
    RequestEnded,
    RequestFailed,
    StepObserver,
    TokenDrawn,
)
from compute_node.interleaved_engine import InterleavedEngine
from compute_node.sampling import Sampling
from compute_node.step_ledger import Phase, StepLedger, TokenSpan
from promoe.errors import (
    InsufficientMemory,
    InternalError,
    ModelUnsupported,
    PromoeError,
    ResourceExhausted,
    Unavailable,
)

logger = logging.getLogger(__name__)

_PROBE_ID: Final = "engine-probe"
_PROBE_PROMPT: Final = (1, 2, 3, 2, 1)
_PROBE_DEADLINE_S: Final = 600.0
_LOGIT_TOLERANCE: Final = 0.02
"""How far, as a share of the logits' range, the probed token may be from the best one: paged attention adds up in
another order than the plain forward pass, and may break a near tie otherwise."""


@dataclass(frozen=True)
class EnginePlan:
    """What either engine needs to know.

    Attributes:
        batch: what one step of continuous batching may hold.
        max_request_tokens: prompt plus answer of one request at most, for the interleaved engine.
    """

    batch: BatchLimits
    max_request_tokens: int


class EngineStarter:
    """Starts an engine for a model.

    Args:
        model: the model, ready to run.
        ledger: for the engine.
        plan: for the engine.
        observe_step: for the engine; told of the probe's steps, too.
        on_death: for the engine that is chosen; not called for one that fails its probe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ledger: StepLedger,
        plan: EnginePlan,
        observe_step: StepObserver,
        on_death: DeathCallback,
    ) -> None:
        self._model = model
        self._ledger = ledger
        self._plan = plan
        self._observe_step = observe_step
        self._on_death = on_death
        self._is_probing = False

    def start(self, choice: EngineChoice) -> tuple[Engine, str]:
        """Starts the engine that was chosen, or with `AUTO` the one that can serve the model; says why in a sentence.

        Raises:
            ModelUnsupported: continuous batching was asked for and cannot serve the model.
            InsufficientMemory: the device cannot hold the planned KV blocks.
            PromoeError: the probe failed for a reason that has nothing to do with the engine.
        """
        if choice is EngineChoice.INTERLEAVED:
            return self._start_interleaved(), "The interleaved engine was asked for."
        engine, complaint = self._try_continuous()
        if engine is not None:
            asked = " as asked" if choice is EngineChoice.CONTINUOUS else ""
            return engine, f"Continuous batching serves this model{asked}: its first token was tried."
        family = self._model.config.model_type
        reason = f"Transformers' continuous batching cannot serve {family} models: {complaint}."
        if choice is EngineChoice.CONTINUOUS:
            raise ModelUnsupported(f"{reason} Use engine auto or interleaved.")
        return self._start_interleaved(), f"{reason[:-1]}; requests take turns instead."

    def _start_interleaved(self) -> Engine:
        engine = InterleavedEngine(
            self._model, self._ledger, self._plan.max_request_tokens, self._observe_step, self._on_death
        )
        engine.start()
        # Ready is who has computed a token through the experts; this engine has nothing to compare it with.
        try:
            _draw_one(engine)
        except PromoeError:
            engine.stop()
            raise
        return engine

    def _try_continuous(self) -> tuple[Engine | None, str]:
        """The started engine, or None and what is wrong with it."""
        expected_V = self._plain_forward()
        attention = self._model.config._attn_implementation
        self._is_probing = True
        with _quiet():
            try:
                engine = ContinuousEngine(
                    self._model, self._ledger, self._plan.batch, self._observe_step, self._continuous_died
                )
            except ValueError as error:
                self._model.set_attn_implementation(attention)
                return None, _first_line(error)
            engine.start()
            complaint: str | None = "the probe was given up"
            try:
                complaint = self._probe(engine, expected_V)
            finally:
                if complaint is not None:
                    engine.stop()
        if complaint is not None:
            return None, complaint
        self._is_probing = False
        if engine.fatal_error is not None:
            # It died behind its last token, when nobody was to be told.
            return None, _first_line(engine.fatal_error)
        return engine, ""

    def _plain_forward(self) -> torch.Tensor:
        """Logits (V,) after the probe's prompt, without any KV cache: the oracle of the probe."""
        self._ledger.begin_step([TokenSpan(_PROBE_ID, len(_PROBE_PROMPT), Phase.PREFILL)])
        try:
            with torch.no_grad():
                prompt_1T = torch.tensor([_PROBE_PROMPT], device=self._model.device)
                output = self._model(input_ids=prompt_1T, use_cache=False)
        finally:
            self._ledger.end_step()
            self._ledger.take(_PROBE_ID)
        logits_V: torch.Tensor = output.logits[0, -1].float()
        return logits_V

    def _probe(self, engine: ContinuousEngine, expected_V: torch.Tensor) -> str | None:
        """Draws one token; returns what is wrong with it, or None."""
        events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        try:
            engine.submit(EngineRequest(_PROBE_ID, _PROBE_PROMPT, 1, Sampling(), frozenset()), events.put)
        except Unavailable as error:
            # What cannot be built is found by the engine's thread, which may have ended before it was asked.
            return self._complaint(engine, error)
        token_id: int | None = None
        while True:
            try:
                event = events.get(timeout=_PROBE_DEADLINE_S)
            except queue.Empty:
                return f"it gave no token within {_PROBE_DEADLINE_S:g} s"
            if isinstance(event, TokenDrawn):
                token_id = event.token.token_id
            elif isinstance(event, RequestFailed):
                return self._complaint(engine, event.error)
            elif isinstance(event, RequestEnded):
                break
        if token_id is None:
            return "it gave an empty answer"
        distance = float((expected_V.max() - expected_V[token_id]) / (expected_V.max() - expected_V.min()))
        if not distance <= _LOGIT_TOLERANCE:
            return f"it drew token {token_id} where a plain forward pass says {int(expected_V.argmax())}"
        return None

    def _complaint(self, engine: ContinuousEngine, error: PromoeError) -> str:
        # The thread tells the request before it says what ended it; after `stop` both are known.
        engine.stop()
        fatal = engine.fatal_error
        if isinstance(fatal, torch.OutOfMemoryError) or isinstance(error, ResourceExhausted):
            blocks = self._plan.batch.num_kv_blocks
            raise InsufficientMemory(
                f"The device has no room for {blocks} KV blocks and one step; lower --memory, --cache-rate or "
                f"compute.max_context_tokens. ({_first_line(fatal or error)})"
            ) from error
        if fatal is None and not isinstance(error, InternalError):
            raise error
        return _first_line(fatal or error)

    def _continuous_died(self) -> None:
        if not self._is_probing:
            self._on_death()


def _draw_one(engine: Engine) -> None:
    """Raises what keeps the engine from giving a token."""
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    engine.submit(EngineRequest(_PROBE_ID, _PROBE_PROMPT, 1, Sampling(), frozenset()), events.put)
    while True:
        try:
            event = events.get(timeout=_PROBE_DEADLINE_S)
        except queue.Empty:
            raise InternalError(f"The engine gave no token within {_PROBE_DEADLINE_S:g} s.") from None
        if isinstance(event, RequestFailed):
            raise event.error
        if isinstance(event, RequestEnded):
            return


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the traceback of a probe that fails out of the log: the outcome is a sentence."""
    loggers = [logging.getLogger("ContinuousBatchingLogger"), logging.getLogger(ContinuousEngine.__module__)]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
