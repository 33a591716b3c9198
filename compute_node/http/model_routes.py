"""What is served, and what is not."""

from fastapi import APIRouter

from compute_node.http.answer_wire import JsonDocument
from compute_node.http.api_error import ApiError, check_model
from compute_node.http.node_parts import NodeParts


def model_router(parts: NodeParts) -> APIRouter:
    """`/v1/models`, and the endpoints that this server does not have although clients may look for them."""
    router = APIRouter()
    model = parts.model
    document: JsonDocument = {
        "id": model.name,
        "object": "model",
        "created": model.loaded_unix_s,
        "owned_by": "promoe",
        "max_model_len": model.max_context_tokens,
    }

    @router.get("/v1/models")
    async def models() -> JsonDocument:
        return {"object": "list", "data": [document]}

    # A hub id has a slash.
    @router.get("/v1/models/{name:path}")
    async def one(name: str) -> JsonDocument:
        check_model(name, model.name)
        return document

    @router.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ApiError(400, f"{model.name} generates text; this server makes no embeddings.", code="unsupported")

    return router
