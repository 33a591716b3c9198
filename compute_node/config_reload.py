"""What a serving node takes over from a configuration that has changed: the predictor's endpoint, and nothing else.

Everything else is named, so that nobody believes it to be in effect.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Final

from compute_node.config import ComputeConfig
from compute_node.takeovers import Takeovers
from promoe.config import LogConfig
from promoe.errors import PromoeError
from promoe.node_report import PredictorSwitch

logger = logging.getLogger(__name__)

_RELOADABLE: Final = "compute.predictor_endpoint"

ASKING: Final = "a reload of the configuration"


@dataclass(frozen=True)
class AskedConfig:
    """A node's sections."""

    compute: ComputeConfig
    log: LogConfig


class ConfigReload:
    """Reads the configuration again.

    Args:
        asked: what the node was started with.
        read: reads it anew; raises ValueError for what cannot be read.
        takeovers: of the node's predictors; None where the policy has no use for hints.
    """

    def __init__(self, asked: AskedConfig, read: Callable[[], AskedConfig], takeovers: Takeovers | None) -> None:
        self._asked = asked
        self._read = read
        self._takeovers = takeovers

    def reload(self) -> None:
        """Says what has changed; does not wait for a predictor that is to take over."""
        try:
            asked = self._read()
        except ValueError as error:
            logger.error("The configuration was changed and cannot be read; everything stays as it is: %s", error)
            return
        changed = list(_changed(self._asked, asked))
        fixed = [name for name in changed if name != _RELOADABLE]
        if fixed:
            logger.warning("Changed in the configuration, but not while the node serves: %s.", ", ".join(fixed))
        if _RELOADABLE in changed:
            self._connect(asked.compute.predictor_endpoint)
        if not changed:
            logger.info("The configuration was read again; nothing has changed.")

    def _connect(self, endpoint: str) -> None:
        if self._takeovers is None:
            logger.warning("%s was changed, but the policy ignores hints.", _RELOADABLE)
            return
        if not endpoint:
            logger.warning("%s was emptied; a serving node keeps its predictor.", _RELOADABLE)
            return
        try:
            outcome = self._takeovers.connect(endpoint, ASKING, "")
        except PromoeError as error:
            logger.warning("%s was changed and cannot be now: %s", _RELOADABLE, error)
            return
        outcome.add_done_callback(lambda done: self._connected(endpoint, done))

    def _connected(self, endpoint: str, outcome: "Future[PredictorSwitch | None]") -> None:
        """What was refused, and said to be, is tried again with the next reload."""
        if not outcome.cancelled() and outcome.exception() is None:
            self._asked = replace(self._asked, compute=replace(self._asked.compute, predictor_endpoint=endpoint))


def _changed(before: AskedConfig, after: AskedConfig) -> Iterator[str]:
    """Settings that differ, as `section.key`."""
    for section in fields(before):
        was, now = getattr(before, section.name), getattr(after, section.name)
        for setting in fields(was):
            if getattr(was, setting.name) != getattr(now, setting.name):
                yield f"{section.name}.{setting.name}"
