"""Errors as OpenAI's API has them: one table from the domain's errors to HTTP, and one shape for all of them."""

import json
import math
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from promoe.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    PromoeError,
    ResourceExhausted,
    Unavailable,
)

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"

_STATUS_OF_ERROR: Final[tuple[tuple[type[PromoeError], int, str], ...]] = (
    (InvalidInput, 400, _INVALID),
    (ModelNotFound, 404, _INVALID),
    (ModelMismatch, 409, _INVALID),
    (Overloaded, 429, "rate_limit_error"),
    (Unavailable, 503, _SERVER),
    (ResourceExhausted, 503, _SERVER),
    (DeadlineExceeded, 504, _SERVER),
)

_UNAVAILABLE_RETRY_AFTER_MS: Final = 1000

_PARAM_OF_FIELD: Final = {"stop_strings": "stop", "prompt.chat": "messages"}
"""What the domain calls a field, and what it is called here."""

_MAX_SHOWN_CHARS: Final = 80


class ApiError(Exception):
    """A refusal that is HTTP's own, or that names a field.

    Args:
        status: HTTP's.
        message: a sentence.
        param: the field that is to blame.
        code: for machines.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def check_model(asked: str | None, served: str) -> None:
    """Raises ApiError when another model is asked for than the one that is served."""
    if asked not in (None, served):
        raise ApiError(
            404, f"The model {_shown(asked)} does not exist here; served: {served}.", "model", "model_not_found"
        )


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """What a client reads."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_and_body(error: PromoeError | ValueError, is_chat: bool = False) -> tuple[int, dict[str, object]]:
    """A domain error by the table; errors that are not in it are bugs of this side.

    Args:
        error: the error.
        is_chat: the prompt is called `messages`.
    """
    if isinstance(error, ValueError):
        param = param_of(str(error))
        return 400, error_body(str(error), _INVALID, "messages" if is_chat and param == "prompt" else param)
    for error_type, status, kind in _STATUS_OF_ERROR:
        if isinstance(error, error_type):
            return status, error_body(str(error), kind, code=type(error).__name__)
    return 500, error_body(str(error), _SERVER, code=type(error).__name__)


def api_error_body(error: ApiError) -> dict[str, object]:
    """An ApiError as a client reads it."""
    return error_body(str(error), _INVALID, error.param, error.code)


def api_error_response(error: ApiError) -> JSONResponse:
    """An ApiError as a response."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(api_error_body(error), error.status, headers)


def param_of(message: str) -> str | None:
    """The field that a sentence such as `top_p is 2; allowed: …` begins with."""
    field = message.partition(" ")[0]
    if not field.replace("_", "").replace(".", "").isalnum() or not field[:1].islower():
        return None
    return next((param for name, param in _PARAM_OF_FIELD.items() if field.startswith(name)), field.split(".")[0])


def install_error_pages(app: FastAPI) -> None:
    """Every error of the app has OpenAI's shape; a bug is logged with its traceback and says nothing else."""

    async def domain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PromoeError | ValueError), "registered for these"
        status, body = status_and_body(error, is_chat="/chat/" in request.url.path)
        return JSONResponse(body, status, _retry_headers(error))

    async def api(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError), "registered for these"
        return api_error_response(error)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), "registered for these"
        message, param = _validation_sentence(error)
        return JSONResponse(error_body(message, _INVALID, param), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), "registered for these"
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(error_body(message, _INVALID), error.status_code, error.headers)

    async def bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again behind this answer, and uvicorn logs its traceback.
        return JSONResponse(error_body("Internal error; the compute node's log has the details.", _SERVER), 500)

    for error_type, page in (
        (PromoeError, domain),
        (ValueError, domain),
        (ApiError, api),
        (RequestValidationError, validation),
        (HTTPException, http),
        (Exception, bug),
    ):
        app.add_exception_handler(error_type, page)


def _retry_headers(error: Exception) -> dict[str, str] | None:
    if isinstance(error, Overloaded):
        retry_after_ms = error.retry_after_ms
    elif isinstance(error, Unavailable):
        retry_after_ms = _UNAVAILABLE_RETRY_AFTER_MS
    else:
        return None
    return {"retry-after": str(math.ceil(retry_after_ms / 1000)), "retry-after-ms": str(retry_after_ms)}


def _validation_sentence(error: RequestValidationError) -> tuple[str, str | None]:
    """The first complaint: the field, what it was, and what is allowed."""
    first = error.errors()[0]
    kind, place = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        return f"The body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}.", None
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return message, _path_of(place) or param_of(message)
    if not place:
        return "The body is not a JSON object, or its content-type is not application/json.", None
    field = _path_of(place, is_key_last=kind == "extra_forbidden")
    if kind == "extra_forbidden":
        return f"{field} is not supported.", field
    if kind == "missing":
        return f"{field} is missing.", field
    expectation = str(first["msg"]).replace("Input should be", "expected").replace("False", "false")
    return f"{field} is {_shown(first['input'])}; {expectation}.", field


def _path_of(place: list[object], is_key_last: bool = False) -> str:
    """`messages[0].content`; pydantic's names of a union's alternatives are left out, which no key at the end is."""
    path = ""
    for rank, part in enumerate(place):
        is_key = rank == len(place) - 1 and is_key_last
        if isinstance(part, int):
            path += f"[{part}]"
        elif is_key or (str(part).isidentifier() and not str(part)[:1].isupper()):
            path += f".{part}" if path else str(part)
    return path


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = text.encode(errors="backslashreplace").decode()  # JSON may hold half a character, UTF-8 may not
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}…"
