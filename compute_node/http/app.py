"""The HTTP API of one node: routers over the parts that gRPC uses, behind one edge."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from compute_node.http.api_error import install_error_pages
from compute_node.http.completion_routes import completion_router
from compute_node.http.edge import Edge, EdgeRules
from compute_node.http.health_routes import health_router
from compute_node.http.live_routes import live_router
from compute_node.http.model_routes import model_router
from compute_node.http.node_parts import NodeParts
from compute_node.http.page_origin import PageOrigin
from compute_node.http.page_routes import page_paths, page_router, read_page
from compute_node.http.predictor_routes import predictor_router
from compute_node.http.token_routes import token_router
from promoe.request_id import REQUEST_ID_HEADER


@dataclass(frozen=True)
class AppSettings:
    """How the API is open to the world.

    Attributes:
        rules: keys and limits.
        cors_origins: web pages of these origins may use it; none by default.
    """

    rules: EdgeRules
    cors_origins: tuple[str, ...] = ()


def build_app(parts: NodeParts, settings: AppSettings, further: Sequence[APIRouter] = ()) -> ASGIApp:
    """The whole API.

    Args:
        parts: what it stands on.
        settings: how it is open to the world.
        further: routers beside the API's own; what of theirs needs no key belongs to `settings.rules.open_paths`.
    """
    # No interactive pages: they load their scripts from elsewhere.
    app = FastAPI(title="promoe", docs_url=None, redoc_url=None)
    install_error_pages(app)
    page = read_page()
    origin = PageOrigin(settings.cors_origins)
    for router in (
        page_router(page),
        live_router(parts, origin),
        predictor_router(parts, origin),
        completion_router(parts),
        model_router(parts),
        token_router(parts),
        health_router(parts),
        *further,
    ):
        app.include_router(router)
    open_paths = settings.rules.open_paths | page_paths(page)
    edge = Edge(app, replace(settings.rules, open_paths=open_paths))
    if not settings.cors_origins:
        return edge
    # Outside of the edge: without its headers a page cannot read why it was refused.
    return CORSMiddleware(
        edge,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(REQUEST_ID_HEADER, "retry-after"),
    )
