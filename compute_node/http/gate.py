"""From the configuration to the HTTP API: what keeps it from being open is found before anything takes long."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter

from compute_node.config import ComputeConfig
from compute_node.http.api_keys import keys_for
from compute_node.http.app import AppSettings, build_app
from compute_node.http.edge import EdgeRules
from compute_node.http.health_routes import OPEN_PATHS
from compute_node.http.http_server import HttpListener
from compute_node.http.node_parts import NodeParts

logger = logging.getLogger(__name__)


class HttpGate:
    """The node's HTTP address, taken at once and opened when the node can answer.

    Args:
        config: what was asked for; has an `http_listen`.

    Raises:
        SettingUnfit: the keys cannot be read, or others could use the API without one.
        AlreadyRunning: the address is taken.
    """

    def __init__(self, config: ComputeConfig) -> None:
        keys = keys_for(config)
        origins = tuple(origin.strip() for origin in config.http_cors_origins.split(",") if origin.strip())
        # A key, or the wish that nobody needs one, lets other hosts' names in.
        is_private = not keys.are_needed and not config.http_anonymous
        rules = EdgeRules(keys, OPEN_PATHS, config.http_max_body_bytes, is_private)
        self._settings = AppSettings(rules, origins)
        self._listener = HttpListener(config.http_listen)

    @property
    def url(self) -> str:
        """Where clients find the API, without `/v1`."""
        return f"http://{self._listener.address}"

    @asynccontextmanager
    async def serving(self, parts: NodeParts, further: Sequence[APIRouter] = ()) -> AsyncIterator[None]:
        """Answers while entered.

        Args:
            parts: the node that answers.
            further: see `build_app`.
        """
        server = self._listener.serve(build_app(parts, self._settings, further))
        logger.info("The OpenAI-compatible API is at %s/v1.", self.url)
        try:
            yield
        finally:
            await server.stop()

    def close(self) -> None:
        """Gives the address back; idempotent."""
        self._listener.close()
