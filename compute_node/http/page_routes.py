"""The page at `/`: files that come with the package, read once, served with a policy that lets them reach nothing but
this node."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from compute_node.http.api_error import ApiError

INDEX: Final = "index.html"

_MEDIA_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)

_CONTENT_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text becomes markup, whatever the scripts do with it.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cache-control": "no-cache",
        "content-security-policy": _CONTENT_POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
)


@dataclass(frozen=True)
class PageFile:
    """One file, ready to be sent."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> Mapping[str, PageFile]:
    """The files of the page, by name."""
    page: dict[str, PageFile] = {}
    for entry in files("compute_node.http").joinpath("page").iterdir():
        media_type = _MEDIA_TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            content = entry.read_bytes()
            page[entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    assert INDEX in page, "the page comes with the package"
    return page


def page_paths(page: Mapping[str, PageFile]) -> frozenset[str]:
    """What needs no key: the page has nothing of the node; what it asks for later does."""
    return frozenset({"/", *(f"/page/{name}" for name in page)})


def page_router(page: Mapping[str, PageFile]) -> APIRouter:
    """`/` and what it consists of."""
    router = APIRouter()

    @router.get("/")
    async def index(request: Request) -> Response:
        return _response(page[INDEX], request)

    @router.get("/page/{name}")
    async def part(name: str, request: Request) -> Response:
        if name not in page:
            raise ApiError(404, f"The page has no file {name}.", code="not_found")
        return _response(page[name], request)

    return router


def _response(file: PageFile, request: Request) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    known = re.findall(r'"[^"]*"', request.headers.get("if-none-match", ""))
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
