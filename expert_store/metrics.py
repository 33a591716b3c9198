"""The store's Prometheus page: the table's figures, read when somebody asks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_store.store import ExpertStore
from promoe import telemetry


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
    """Serves the store's page; see `telemetry.metrics_page`."""
    registry = CollectorRegistry()
    registry.register(StoreCollector(store))
    with telemetry.metrics_page(registry, "store.metrics_listen", listen):
        yield
