"""The door to the engine: how many requests run, how many wait, how long they may live, and who is refused.

Owned by the event loop; the engine's thread reaches it only through `call_soon_threadsafe`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Final

from compute_node.engine import (
    EndReason,
    Engine,
    EngineEvent,
    EngineRequest,
    RequestEnded,
    RequestFailed,
    TokenDrawn,
)
from compute_node.request_metrics import Outcome, RequestMetrics
from compute_node.step_ledger import RequestUse
from promoe.errors import DeadlineExceeded, Overloaded, PromoeError, Unavailable

logger = logging.getLogger(__name__)

_MIN_RETRY_AFTER_S: Final = 0.1
_MAX_RETRY_AFTER_S: Final = 60.0
_FIRST_SERVICE_GUESS_S: Final = 1.0
_SERVICE_SMOOTHING: Final = 0.2


@dataclass(frozen=True)
class AdmissionLimits:
    """How much is let in.

    Attributes:
        max_concurrent_requests: requests the engine works on.
        max_queued_requests: accepted requests that wait; further ones are refused.
        request_deadline_s: longest life of one request, queueing included.
    """

    max_concurrent_requests: int
    max_queued_requests: int
    request_deadline_s: float


class _Place(Enum):
    """Where a request is: `QUEUED → RUNNING → GONE`, or `QUEUED → GONE` when it is cancelled in time."""

    QUEUED = "queued"
    RUNNING = "running"
    GONE = "gone"


@dataclass(frozen=True)
class OpenRequest:
    """One accepted request that has not ended, as far as others may know of it.

    Attributes:
        request_id: the engine's.
        is_running: the engine works on it; else it waits.
        num_prompt_tokens, num_output_tokens, max_output_tokens: what it has, and what it may get.
        age_s: since it was accepted.
    """

    request_id: str
    is_running: bool
    num_prompt_tokens: int
    num_output_tokens: int
    max_output_tokens: int
    age_s: float


class AdmittedRequest:
    """An accepted request; iterate over it for the engine's events, the last of which ends the iteration."""

    def __init__(self, admission: "Admission", request: EngineRequest) -> None:
        self.request = request
        self.arrived_s = perf_counter()
        self._admission = admission
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._place = _Place.QUEUED
        self._num_drawn = 0
        self._deadline_s = asyncio.get_running_loop().time() + admission.limits.request_deadline_s

    def cancel(self) -> None:
        """Ends the request within one step; idempotent, and without effect when it has ended."""
        self._admission.cancel(self)

    async def events(self) -> AsyncIterator[EngineEvent]:
        """The engine's events up to RequestEnded.

        Raises:
            DeadlineExceeded: the request lived longer than it may; it is cancelled.
            PromoeError: it failed.
        """
        while True:
            try:
                async with asyncio.timeout_at(self._deadline_s):
                    event = await self._events.get()
            except TimeoutError:
                self.cancel()
                life_s = self._admission.limits.request_deadline_s
                raise DeadlineExceeded(f"The request was not finished within {life_s:g} s.") from None
            if isinstance(event, RequestFailed):
                raise event.error
            yield event
            if isinstance(event, RequestEnded):
                return

    # ---- for Admission only ----

    @property
    def place(self) -> _Place:
        """Where it is."""
        return self._place

    def move(self, place: _Place) -> None:
        """Puts it somewhere else."""
        self._place = place

    def deliver(self, event: EngineEvent) -> None:
        """One event, on the event loop."""
        self._num_drawn += isinstance(event, TokenDrawn)
        self._events.put_nowait(event)

    def described(self) -> OpenRequest:
        """As it is now."""
        return OpenRequest(
            request_id=self.request.request_id,
            is_running=self._place is _Place.RUNNING,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_output_tokens=self._num_drawn,
            max_output_tokens=self.request.max_tokens,
            age_s=perf_counter() - self.arrived_s,
        )


class Admission:
    """A bounded first-in-first-out queue before the engine.

    Args:
        engine: already started.
        limits: how much is let in.
        metrics: told the load and refused requests.
    """

    def __init__(self, engine: Engine, limits: AdmissionLimits, metrics: RequestMetrics) -> None:
        self.limits = limits
        self._engine = engine
        self._metrics = metrics
        self._queue: deque[AdmittedRequest] = deque()
        self._running: dict[str, AdmittedRequest] = {}
        self._refusal: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._service_s = _FIRST_SERVICE_GUESS_S

    @property
    def num_running(self) -> int:
        """Requests the engine works on."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def refusal(self) -> str | None:
        """Why nobody is let in any more; None while requests are."""
        return self._refusal

    def open_requests(self) -> tuple[OpenRequest, ...]:
        """All that have not ended: those that run, then those that wait, in the order of their turns."""
        return tuple(admitted.described() for admitted in (*self._running.values(), *self._queue))

    def cancel_id(self, request_id: str) -> bool:
        """Ends an open request within one step, whoever asked for it; False when there is none of this id."""
        for admitted in (*self._running.values(), *self._queue):
            if admitted.request.request_id == request_id:
                self.cancel(admitted)
                return True
        return False

    def admit(self, request: EngineRequest) -> AdmittedRequest:
        """Lets a request in, to run now or to wait.

        Raises:
            Overloaded: running and waiting places are all taken.
            Unavailable: the node is shutting down, or its engine died.
        """
        self.check_open()
        admitted = AdmittedRequest(self, request)
        self._queue.append(admitted)
        self._idle.clear()
        self._fill()
        return admitted

    def check_open(self) -> None:
        """Raises what `admit` would raise now: asked before the work of encoding a prompt is spent on a refusal."""
        if self._refusal is not None:
            self._metrics.count_request(Outcome.REFUSED)
            raise Unavailable(self._refusal)
        has_room = self.num_running < self.limits.max_concurrent_requests
        if not has_room and self.num_queued >= self.limits.max_queued_requests:
            self._metrics.count_request(Outcome.REFUSED)
            raise Overloaded(
                f"{self.num_running} requests are running and {self.num_queued} are waiting, which is all this compute "
                "node takes; try again later.",
                retry_after_ms=int(1000 * self._retry_after_s()),
            )

    def cancel(self, admitted: AdmittedRequest) -> None:
        """See `AdmittedRequest.cancel`."""
        if admitted.place is _Place.RUNNING:
            self._engine.cancel(admitted.request.request_id)
        elif admitted.place is _Place.QUEUED:
            self._queue.remove(admitted)
            admitted.move(_Place.GONE)
            admitted.deliver(RequestEnded(EndReason.CANCELLED, None, 0, RequestUse(), perf_counter()))
            self._load_changed()

    def refuse(self, reason: str) -> None:
        """Lets nobody in any more; those who wait fail, too. For a dead engine and for the end of a drain."""
        self._refusal = reason
        while self._queue:
            admitted = self._queue.popleft()
            admitted.move(_Place.GONE)
            admitted.deliver(RequestFailed(Unavailable(reason)))
        self._load_changed()

    async def drain(self, deadline_s: float) -> None:
        """Lets nobody in any more, and returns when all accepted requests have ended or the deadline has passed.

        Those that are open at the deadline fail with Unavailable.
        """
        self._refusal = "This compute node is shutting down."
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("Cancelling %d requests at the drain deadline.", self.num_running + self.num_queued)
            self.refuse(self._refusal)
            for admitted in self._running.values():
                admitted.deliver(RequestFailed(Unavailable(self._refusal)))
                self._engine.cancel(admitted.request.request_id)

    def _fill(self) -> None:
        while self._queue and self.num_running < self.limits.max_concurrent_requests:
            self._submit(self._queue.popleft())
        self._load_changed()

    def _submit(self, admitted: AdmittedRequest) -> None:
        loop = asyncio.get_running_loop()
        started_s = perf_counter()

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, RequestEnded | RequestFailed):
                self._left(admitted, perf_counter() - started_s)
            admitted.deliver(event)

        def sink(event: EngineEvent) -> None:
            # A closed loop means that the process is ending and nobody listens.
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_event, event)

        admitted.move(_Place.RUNNING)
        self._running[admitted.request.request_id] = admitted
        try:
            self._engine.submit(admitted.request, sink)
        except PromoeError as error:
            self._take_out(admitted)
            admitted.deliver(RequestFailed(error))

    def _left(self, admitted: AdmittedRequest, service_s: float) -> None:
        self._take_out(admitted)
        self._service_s += _SERVICE_SMOOTHING * (service_s - self._service_s)
        self._fill()

    def _take_out(self, admitted: AdmittedRequest) -> None:
        admitted.move(_Place.GONE)
        del self._running[admitted.request.request_id]

    def _load_changed(self) -> None:
        self._metrics.observe_load(self.num_running, self.num_queued)
        if not self._running and not self._queue:
            self._idle.set()

    def _retry_after_s(self) -> float:
        """When a place should become free, from how long requests took lately."""
        expected_s = self._service_s / self.limits.max_concurrent_requests
        return min(max(expected_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
