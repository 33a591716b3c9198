"""For those who watch the process: alive, ready, figures."""

from typing import Final

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.node_parts import NodeParts
from promoe.errors import Unavailable

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""What an orchestrator asks without a key."""


def health_router(parts: NodeParts) -> APIRouter:
    """`/health`, `/ready` and `/metrics`.

    Nothing is answered before the node has computed a real token through its expert path, so ready is who still lets
    requests in.
    """
    router = APIRouter()

    @router.get("/health")
    async def health() -> JsonDocument:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> JsonDocument:
        refusal = parts.admission.refusal
        if refusal is not None:
            raise Unavailable(refusal)
        load = parts.admission
        return {"status": "ready", "running_requests": load.num_running, "queued_requests": load.num_queued}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(parts.registry), media_type=CONTENT_TYPE_LATEST)

    return router
