"""How long each part of the way from no engine to a stack took, told in the log while it goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

logger = logging.getLogger(__name__)


@contextmanager
def timed(outcome: str) -> Iterator[None]:
    """Logs `outcome` and the seconds that what is done within took, when it has come to be."""
    began_s = perf_counter()
    yield
    logger.info("%s after %.1f s", outcome, perf_counter() - began_s)
