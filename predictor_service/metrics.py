"""The predictor service's Prometheus page: the sessions' figures, read when somebody asks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from predictor_service.session_book import PredictorStats
from promoe import telemetry


class PredictorCollector(Collector):
    """Turns the sessions' figures into metrics; called in the page's thread, reads only."""

    def __init__(self, stats: Callable[[], PredictorStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """One sample per metric."""
        stats = self._stats()
        active = {"version": stats.active.version, "predictor": stats.active.predictor}
        yield InfoMetricFamily(telemetry.PREDICTOR, "What makes the hints.", value=active)
        yield GaugeMetricFamily(telemetry.PREDICTOR_SESSIONS, "Compute nodes connected.", value=stats.sessions)
        for name, text, value in (
            (telemetry.OBSERVATIONS, "Observations predicted from.", stats.observations),
            (telemetry.DROPPED_OBSERVATIONS, "Observations dropped by a full queue.", stats.dropped_observations),
            (telemetry.REFUSED_OBSERVATIONS, "Observations that were no use.", stats.refused_observations),
            (telemetry.PREDICTOR_HINTS, "Hints made.", stats.hints),
            (telemetry.UNSENT_HINTS, "Hints that nodes left no room for.", stats.unsent_hints),
            (telemetry.PREDICT_SECONDS, "Time spent predicting.", stats.predict_s),
        ):
            yield CounterMetricFamily(name, text, value=value)


@contextmanager
def metrics_page(stats: Callable[[], PredictorStats], listen: str) -> Iterator[None]:
    """Serves the service's page; see `telemetry.metrics_page`."""
    registry = CollectorRegistry()
    registry.register(PredictorCollector(stats))
    with telemetry.metrics_page(registry, "predictor.metrics_listen", listen):
        yield
