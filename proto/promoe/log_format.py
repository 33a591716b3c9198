"""A log line as text for people, or as a JSON object for programs; both say which request it is about."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import Enum
from typing import Final


class LogFormat(Enum):
    """How a process writes its log."""

    TEXT = "text"
    JSON = "json"


REQUEST_ID: Final[ContextVar[str]] = ContextVar("request_id", default="")
"""The request that is served; set where it arrives, inherited by every task that serves it."""

TRACEPARENT: Final[ContextVar[str]] = ContextVar("traceparent", default="")
"""The caller's span, in the words of W3C Trace Context, which its request's spans go below."""


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `process`, `logger`, `message`, and where there are any `request_id`,
    the record's own `fields`, and an `exception`.

    Args:
        process: whose log it is.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id:
            document["request_id"] = request_id
        fields = vars(record).get("fields")
        if isinstance(fields, dict):
            document |= fields
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False, default=str)


def formatter_for(log_format: LogFormat, process: str) -> logging.Formatter:
    """What writes the lines."""
    if log_format is LogFormat.JSON:
        return JsonFormatter(process)
    return logging.Formatter(f"%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s")


def log_format_in_use() -> LogFormat:
    """This process's, for a child that is to log alike."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
    return LogFormat.JSON if is_json else LogFormat.TEXT
