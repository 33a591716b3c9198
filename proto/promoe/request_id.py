"""How a request is named, so that the logs of all processes can be searched for it.

A caller may name its request in the header (or the gRPC metadata) `x-request-id`; else the node does. Each answer to it
has a name of its own, which begins with the request's: predictors, traces and the page know answers.
"""

import re
import secrets
from collections.abc import Iterable
from typing import Final

REQUEST_ID_HEADER: Final = "x-request-id"

TRACEPARENT_HEADER: Final = "traceparent"

MAX_REQUEST_ID_CHARS: Final = 64

MAX_ANSWER_ID_CHARS: Final = MAX_REQUEST_ID_CHARS + 17

_FIT: Final = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")


def is_fit(request_id: str) -> bool:
    """Whether a log can have it as it is."""
    return _FIT.fullmatch(request_id) is not None


def request_id_of(asked: str) -> str:
    """The caller's own name for its request where it is fit for a log, else a new one."""
    return asked if is_fit(asked) else secrets.token_hex(12)


def new_answer_id(request_id: str) -> str:
    """Unlike any other, whatever callers name their requests; an answer to nobody's request has no first part."""
    return f"{request_id}.{secrets.token_hex(8)}" if request_id else secrets.token_hex(8)


def answered_request_id(answer_id: str) -> str:
    """The request that it is an answer to; empty where there is none."""
    return answer_id.rpartition(".")[0]


def about_answers(answer_ids: Iterable[str], **fields: object) -> dict[str, object]:
    """`extra` of a log line about these answers, for a thread that serves many at once; with further fields."""
    answers = list(answer_ids)
    requests = sorted({answered_request_id(answer_id) for answer_id in answers} - {""})
    return {"fields": {**fields, "request_ids": requests, "answer_ids": answers}}
