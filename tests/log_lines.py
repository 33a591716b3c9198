"""What a process would log as JSON, line by line, as it is logged: a line knows its request only then."""

import json
import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias

from promoe.log_format import JsonFormatter

LINE_DEADLINE_S: Final = 60.0

LogLine: TypeAlias = dict[str, object]


class LogLines(logging.Handler):
    """Lines of all threads, in order."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter(process))
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(self.format(record))

    def next(self) -> LogLine:
        """The next line; waits for it."""
        line = json.loads(self._lines.get(timeout=LINE_DEADLINE_S))
        assert isinstance(line, dict)
        return line


@contextmanager
def json_log(name: str) -> Iterator[LogLines]:
    """Of the logger `name` and those below it, from level INFO on."""
    logger = logging.getLogger(name)
    level, lines = logger.level, LogLines(name)
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
