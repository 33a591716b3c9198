"""The store's Prometheus page: the table's figures, read when somebody asks."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_store.store import ExpertStore
from promoe import telemetry
from promoe.errors import AlreadyRunning

_MAX_PORT: Final = 65535


class StoreCollector(Collector):
    """Turns the store's figures into metrics; called in the page's thread, reads only."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        """One sample per metric."""
        stats = self._store.stats()
        yield GaugeMetricFamily(telemetry.ARENA_BYTES, "Size of the arena.", value=stats.arena_nbytes)
        yield GaugeMetricFamily(telemetry.ARENA_FILLED_BYTES, "Bytes of published experts.", value=stats.filled_nbytes)
        yield GaugeMetricFamily(telemetry.FILL_SECONDS, "Time the fill took, or takes so far.", value=stats.fill_s)
        yield CounterMetricFamily(
            telemetry.DAMAGED_BLOBS, "Experts found damaged in memory.", value=stats.damaged_blobs
        )
        yield GaugeMetricFamily(telemetry.LEASES, "Compute nodes attached.", value=len(stats.leases))


@contextmanager
def metrics_page(store: ExpertStore, listen: str) -> Iterator[None]:
    """Serves the page at `host:port` while entered; nothing for an empty address.

    Raises:
        ValueError: the address is not `host:port`.
        AlreadyRunning: it is taken.
    """
    if not listen:
        yield
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ValueError(f"store.metrics_listen is {listen!r}; expected host:port")
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    try:
        server, thread = start_http_server(int(port), addr=host, registry=registry)
    except OSError as error:
        raise AlreadyRunning(f"The metrics page cannot listen on {listen} ({error.strerror}).") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        _join(thread)


def _join(thread: threading.Thread) -> None:
    thread.join(timeout=5)
