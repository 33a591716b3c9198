"""Names and shapes of what is measured, and how a process logs; the same words in every process."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server

from promoe.config import SettingUnfit
from promoe.errors import AlreadyRunning
from promoe.log_format import LogFormat, formatter_for

# Prometheus metric names, by the glossary. Counters get `_total` from the client library.
HITS: Final = "promoe_expert_hits"
MISSES: Final = "promoe_expert_misses"
LOADED_BYTES: Final = "promoe_expert_loaded_bytes"
STALL_SECONDS: Final = "promoe_stall_seconds"
TTFT_SECONDS: Final = "promoe_ttft_seconds"
ITL_SECONDS: Final = "promoe_itl_seconds"
TPOT_SECONDS: Final = "promoe_tpot_seconds"
QUEUE_SECONDS: Final = "promoe_queue_seconds"
STEP_SECONDS: Final = "promoe_step_seconds"
TOKENS: Final = "promoe_tokens"
REQUESTS: Final = "promoe_requests"
RUNNING_REQUESTS: Final = "promoe_running_requests"
QUEUED_REQUESTS: Final = "promoe_queued_requests"
RESIDENT_EXPERTS: Final = "promoe_resident_experts"
LINK_BUSY_SECONDS: Final = "promoe_link_busy_seconds"
PREFETCHED_BYTES: Final = "promoe_prefetched_bytes"
HINTS: Final = "promoe_hints"
HINTED_EXPERTS: Final = "promoe_hinted_experts"
HINTED_EXPERTS_ROUTED: Final = "promoe_hinted_experts_routed"
HINTED_EXPERTS_READY: Final = "promoe_hinted_experts_ready"
HINT_LATENCY_SECONDS: Final = "promoe_hint_latency_seconds"
HINT_TIME_UNTIL_USE_SECONDS: Final = "promoe_hint_time_until_use_seconds"
NODE_OBSERVATIONS: Final = "promoe_node_observations"
PREDICTOR_CONNECTED: Final = "promoe_predictor_connected"
PREDICTOR_TAKEOVERS: Final = "promoe_predictor_takeovers"
STORE_ATTACHED: Final = "promoe_store_attached"
ARENA_BYTES: Final = "promoe_arena_bytes"
ARENA_FILLED_BYTES: Final = "promoe_arena_filled_bytes"
FILL_SECONDS: Final = "promoe_fill_seconds"
DAMAGED_BLOBS: Final = "promoe_damaged_blobs"
LEASES: Final = "promoe_leases"
PREDICTOR: Final = "promoe_predictor"
PREDICTOR_SESSIONS: Final = "promoe_predictor_sessions"
OBSERVATIONS: Final = "promoe_predictor_observations"
DROPPED_OBSERVATIONS: Final = "promoe_predictor_dropped_observations"
REFUSED_OBSERVATIONS: Final = "promoe_predictor_refused_observations"
PREDICTOR_HINTS: Final = "promoe_predictor_hints"
UNSENT_HINTS: Final = "promoe_predictor_unsent_hints"
PREDICT_SECONDS: Final = "promoe_predictor_predict_seconds"

_MAX_PORT: Final = 65535

LATENCY_BUCKETS_S: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


def configure_logging(process: str, level: str, log_format: LogFormat = LogFormat.TEXT) -> None:
    """Logs to standard error: lines of `time level process logger: message`, or JSON objects. Never logs prompts or
    answers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_for(log_format, process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


@contextmanager
def metrics_page(registry: CollectorRegistry, setting: str, listen: str) -> Iterator[None]:
    """Serves the registry's Prometheus page while entered; nothing for an empty address.

    Args:
        registry: what the page shows.
        setting: the name of the setting that `listen` comes from, for the error.
        listen: `host:port`.

    Raises:
        SettingUnfit: the address is not `host:port`.
        AlreadyRunning: it is taken.
    """
    if not listen:
        yield
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise SettingUnfit(f"{setting} is {listen!r}; expected host:port")
    try:
        server, thread = start_http_server(int(port), addr=host, registry=registry)
    except OSError as error:
        raise AlreadyRunning(f"The metrics page cannot listen on {listen} ({error.strerror}).") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
