"""What is said of one predictor: each time that it is back, and once for each cause of its absence."""

import logging

from promoe.errors import DeadlineExceeded, PromoeError, Unavailable

logger = logging.getLogger(__name__)


class ConnectionLog:
    """Told by the client's thread.

    Args:
        endpoint: of the predictor.
        node: this node's name for itself at that predictor, whose log has it, too.

    Attributes:
        is_quiet: nothing is said, as while somebody else waits for the outcome and will say it.
    """

    def __init__(self, endpoint: str, node: str) -> None:
        self.is_quiet = False
        self._extra: dict[str, object] = {"fields": {"node": node}}
        self._endpoint = endpoint
        # What was said last about a predictor that is away; None after it was said to be there.
        self._said: type[PromoeError] | None = None
        self._has_connected = False

    def connected(self, version: str, has_settled: bool) -> None:
        """It is there; one that misbehaved must have behaved for a while before that is said."""
        if self._has_connected and self._said is None:
            return
        if has_settled or self._said is None or issubclass(self._said, Unavailable | DeadlineExceeded):
            self._said, self._has_connected = None, True
            if not self.is_quiet:
                logger.info("Connected to the predictor at %s: %s.", self._endpoint, version, extra=self._extra)

    def away(self, error: PromoeError) -> None:
        """It is not, or not any more."""
        if self._said is type(error):
            return
        self._said = type(error)
        if not self.is_quiet:
            reason = str(error).rstrip(".")
            logger.warning("The predictor at %s is away: %s. The expert cache only reacts.", self._endpoint, reason)
