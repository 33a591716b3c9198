"""The versions of the predictor that this node is connected to: a look at them, and changes, handed on to its admin."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from typing import Final, TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.api_error import status_and_body
from compute_node.http.event_stream import EventStream, event
from compute_node.http.node_parts import NodeParts
from compute_node.http.page_origin import PageOrigin
from compute_node.http.predictor_fields import ActivateFields, ChangeFields, GuardedFields, ShadowFields
from compute_node.quality_client import watch_quality
from promoe.errors import ModelMismatch, Overloaded, PromoeError, Unavailable
from promoe.predictor_admin import PredictorAdmin
from promoe.predictor_versions import QualityReport, VersionChange

_LOOK_DEADLINE_S: Final = 5.0
_NUM_CHANGES: Final = 30
_QUALITY_INTERVAL_S: Final = 1.0

_NUM_THREADS: Final = 4
_MOST_ASKED: Final = 32
"""Calls that may be under way or wait for a thread; more than that come only when the service hangs."""

_T = TypeVar("_T")


class PredictorDesk:
    """Asks the service at the endpoint that the node is connected to now; calls wait in threads of the desk's own: a
    service that hangs must not take those that prompts are encoded in.

    Args:
        parts: the node.
    """

    def __init__(self, parts: NodeParts) -> None:
        self._reporter = parts.watch.report.reporter
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "predictor-desk")
        self._num_asked = 0

    def endpoint(self) -> str:
        """Where it is.

        Raises:
            Unavailable: this node has none.
        """
        endpoint = self._reporter.predictor_link().endpoint
        if not endpoint:
            raise Unavailable("This compute node was started without a predictor; see compute.predictor_endpoint.")
        return endpoint

    async def look(self, ask: Callable[[PredictorAdmin], _T]) -> _T:
        """The answer, which a service that lives has at once; raises PromoeError."""
        return await self._in_thread(ask, PredictorAdmin(self.endpoint(), _LOOK_DEADLINE_S))

    async def change(self, ask: Callable[[PredictorAdmin], VersionChange | None]) -> JsonDocument:
        """What was changed; null when it was so already; raises PromoeError."""
        change = await self._in_thread(ask, PredictorAdmin(self.endpoint()))
        return {"change": None if change is None else _change_document(change)}

    async def _in_thread(self, ask: Callable[[PredictorAdmin], _T], admin: PredictorAdmin) -> _T:
        if self._num_asked >= _MOST_ASKED:
            raise Overloaded(f"{self._num_asked} calls wait for the predictor at {admin.endpoint}.")
        self._num_asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, ask, admin)
        finally:
            self._num_asked -= 1


def predictor_router(parts: NodeParts, origin: PageOrigin) -> APIRouter:
    """`/api/predictor` and the changes below it."""
    router = APIRouter(prefix="/api/predictor")
    changes = APIRouter(dependencies=[Depends(origin.check)])
    desk = PredictorDesk(parts)

    @router.get("")
    async def versions() -> JsonDocument:
        found, history, learner = await desk.look(
            lambda admin: (admin.versions(), admin.history(_NUM_CHANGES), _learner(admin))
        )
        shown = [{**asdict(info), "origin": info.origin.value, "state": info.state.value} for info in found]
        return {
            "endpoint": desk.endpoint(),
            "versions": shown,
            "history": [_change_document(change) for change in history],
            "learner": learner,
        }

    @router.get("/quality", response_model=None)
    async def quality() -> Response:
        return _quality_stream(desk.endpoint())

    @changes.post("/activate")
    async def activate(fields: ActivateFields, request: Request) -> JsonDocument:
        who = _who(request)
        return await desk.change(
            lambda admin: admin.activate(fields.version, who, fields.why, fields.expected_active, fields.canary_share)
        )

    @changes.post("/shadow")
    async def shadow(fields: ShadowFields, request: Request) -> JsonDocument:
        who = _who(request)
        return await desk.change(lambda admin: admin.set_shadow(fields.version, who, fields.why))

    @changes.post("/clear_shadow")
    async def clear_shadow(fields: ChangeFields, request: Request) -> JsonDocument:
        who = _who(request)
        return await desk.change(lambda admin: admin.clear_shadow(who, fields.why))

    @changes.post("/rollback")
    async def rollback(fields: GuardedFields, request: Request) -> JsonDocument:
        who = _who(request)
        return await desk.change(lambda admin: admin.rollback(who, fields.why, fields.expected_active))

    router.include_router(changes)
    return router


def _who(request: Request) -> str:
    """Written into the history; a key is nobody's name."""
    host = request.client.host if request.client is not None else "an unknown host"
    return f"HTTP from {host}"


def _learner(admin: PredictorAdmin) -> JsonDocument | None:
    """How far learning is; None of a service that is too old to say."""
    try:
        report = admin.learner()
    except ModelMismatch:
        return None
    return {**asdict(report), "state": report.state.value}


def _change_document(change: VersionChange) -> JsonDocument:
    return {**asdict(change), "action": change.action.value}


def _quality_stream(endpoint: str) -> Response:
    """Scores until the client or the service has gone; the service scores for as long as somebody listens."""
    reports = watch_quality(endpoint, _QUALITY_INTERVAL_S)
    gone = asyncio.Event()

    async def events() -> AsyncGenerator[bytes]:
        leaving = asyncio.create_task(gone.wait())
        try:
            async with aclosing(reports):
                while (report := await _next_report(reports, leaving)) is not None:
                    yield event(_quality_document(report))
        except PromoeError as error:
            yield event(status_and_body(error)[1])
        finally:
            leaving.cancel()

    return EventStream(events(), gone.set)


async def _next_report(reports: AsyncGenerator[QualityReport], leaving: "asyncio.Task[bool]") -> QualityReport | None:
    """None when the client goes first, or when there are no more."""
    report = asyncio.ensure_future(anext(reports, None))
    await asyncio.wait((report, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not report.done():
        report.cancel()
        await asyncio.wait((report,))
        return None
    return report.result()


def _quality_document(report: QualityReport) -> JsonDocument:
    document = asdict(report)
    document["qualities"] = [{**asdict(quality), "state": quality.state.value} for quality in report.qualities]
    return document
