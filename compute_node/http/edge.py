"""What every HTTP request passes first: its id, its key, the size of its body. Pure ASGI, so that streams stay streams.

A body is read whole, within a limit and a time, before anybody parses it.
"""

import asyncio
import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compute_node.http.api_error import ApiError, api_error_response
from compute_node.http.api_keys import ApiKeys
from compute_node.http.loopback import is_loopback
from promoe.log_format import REQUEST_ID, TRACEPARENT
from promoe.request_id import REQUEST_ID_HEADER, TRACEPARENT_HEADER, request_id_of

logger = logging.getLogger(__name__)

BODY_DEADLINE_S: Final = 60.0
"""A client that sends its request more slowly than this holds a connection for nothing."""


@dataclass(frozen=True)
class EdgeRules:
    """What is let through.

    Attributes:
        keys: who may come.
        open_paths: what needs no key.
        max_body_nbytes: longest body.
        is_private: only this host's own names are answered to. A web page whose name was made to point here could
            else use the API from a browser on this machine as if it were its own.
    """

    keys: ApiKeys
    open_paths: frozenset[str]
    max_body_nbytes: int
    is_private: bool = False


class Edge:
    """The outermost ASGI layer.

    Args:
        app: what is inside.
        rules: what is let through.
    """

    def __init__(self, app: ASGIApp, rules: EdgeRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything but HTTP is handed on as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = perf_counter()
        headers = Headers(scope=scope)
        request_id = request_id_of(headers.get(REQUEST_ID_HEADER, ""))
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)
        TRACEPARENT.set(headers.get(TRACEPARENT_HEADER, ""))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            self._check_host(headers)
            self._check_key(scope, headers)
            body = await self._read_body(headers, receive)
            if body is not None:  # else the client left before its request was there
                await self._app(scope, _Replay(body, receive), send_with_id)
        except ApiError as error:
            await api_error_response(error)(scope, receive, send_with_id)
        finally:
            elapsed_s = perf_counter() - began_s
            fields = {"method": scope["method"], "path": scope["path"], "status": status, "elapsed_s": elapsed_s}
            message = "%s %s: %d after %.3f s (%s)"
            logger.info(message, *fields.values(), request_id, extra={"fields": fields})

    def _check_host(self, headers: Headers) -> None:
        name = headers.get("host", "localhost")
        if self._rules.is_private and not is_loopback(_host_of(name)):
            raise ApiError(
                403, f"This API answers to this host's own names without a key, not to {name!r}.", code="other_host"
            )

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        # A browser asks without a key whether it may ask with one.
        if scope["path"] in self._rules.open_paths or scope["method"] == "OPTIONS":
            return
        if not self._rules.keys.accept(headers.get("authorization")):
            raise ApiError(401, "A valid API key is needed, as `Authorization: Bearer KEY`.", code="invalid_api_key")

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        most = self._rules.max_body_nbytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise _too_large(most)
        chunks: list[bytes] = []
        nbytes = 0
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    nbytes += len(chunk)
                    if nbytes > most:
                        raise _too_large(most)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, f"The request's body was not there within {BODY_DEADLINE_S:g} s.") from None


class _Replay:
    """`receive` for the app: the body in one piece, then what still comes (that the client has gone)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _host_of(name: str) -> str:
    """Without the port; an IPv6 address has colons of its own."""
    host, _, port = name.rpartition(":")
    return host if host and port.isdecimal() else name


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"The request's body is too large; allowed: at most {most} bytes (compute.http_max_body_bytes)."
    )
