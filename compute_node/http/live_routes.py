"""The running node for those who watch it: live figures, and an end to requests."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from starlette.responses import Response

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.api_error import ApiError
from compute_node.http.event_stream import EventStream
from compute_node.http.live_feed import LiveFeed
from compute_node.http.live_wire import live_document
from compute_node.http.node_parts import NodeParts
from compute_node.http.page_origin import PageOrigin
from promoe.request_id import MAX_ANSWER_ID_CHARS


def live_router(parts: NodeParts, origin: PageOrigin) -> APIRouter:
    """`/api/live` and `/api/requests/ID/cancel`."""
    router = APIRouter()
    admission = parts.admission

    def is_over() -> bool:
        return admission.refusal is not None and not admission.num_running and not admission.num_queued

    feed = LiveFeed(lambda: live_document(parts), is_over)

    @router.get("/api/live", response_model=None)
    async def live() -> Response:
        listener = feed.listen()
        return EventStream(listener.events(), listener.leave)

    @router.post("/api/requests/{request_id}/cancel", dependencies=[Depends(origin.check)])
    async def cancel(request_id: Annotated[str, Path(max_length=MAX_ANSWER_ID_CHARS)]) -> JsonDocument:
        if not admission.cancel_id(request_id):
            raise ApiError(404, f"No open request has the id {request_id}; it may have ended.", code="not_found")
        return {"id": request_id, "state": "cancelled"}

    return router
