"""Log lines as JSON: one object each, with the request they are about, and nothing that breaks a line."""

import asyncio
import json
import logging
import sys

import pytest

from promoe.config import LogConfig, Settings
from promoe.log_format import REQUEST_ID, JsonFormatter, LogFormat, formatter_for


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("compute_node.answer", logging.INFO, "file.py", 1, message, arguments, None)
    vars(made).update(extra)
    return made


def written(line: logging.LogRecord) -> dict[str, object]:
    text = JsonFormatter("compute_node").format(line)
    assert "\n" not in text, "a line is a line"
    document = json.loads(text)
    assert isinstance(document, dict)
    return document


def test_a_line_says_when_who_and_what() -> None:
    document = written(record("Answer %s:\n%d tokens", "é", 3))
    assert document.pop("time")
    assert document == {
        "level": "info", "process": "compute_node", "logger": "compute_node.answer", "message": "Answer é:\n3 tokens",
    }  # fmt: skip


def test_fields_of_a_line_are_fields() -> None:
    assert written(record("x", fields={"status": 200, "elapsed_s": 0.5}))["status"] == 200


def test_a_traceback_is_one_field() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        line = record("It failed.")
        line.exc_info = sys.exc_info()
    assert "ValueError: why" in str(written(line)["exception"])


def test_every_task_that_serves_a_request_says_which() -> None:
    async def serve(request_id: str) -> object:
        REQUEST_ID.set(request_id)
        return await asyncio.create_task(tell())

    async def tell() -> object:
        return written(record("x")).get("request_id")

    async def serve_all() -> list[object]:
        return list(await asyncio.gather(serve("a"), serve("b"), asyncio.create_task(tell())))

    assert asyncio.run(serve_all()) == ["a", "b", None]


def test_the_format_is_asked_for_by_its_name() -> None:
    assert Settings(None, ["log.format=json"]).section("log", LogConfig).format is LogFormat.JSON
    with pytest.raises(ValueError, match=r"log\.format is 'xml'; allowed: text, json"):
        Settings(None, ["log.format=xml"]).section("log", LogConfig)
    assert not isinstance(formatter_for(LogFormat.TEXT, "x"), JsonFormatter)
