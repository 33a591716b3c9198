"""Hints, observations and prefetched bytes for Prometheus, read when the page is asked for."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from compute_node.takeovers import TakeoverCounts
from promoe import telemetry
from promoe.node_report import HintStats, Histogram, PredictorLink, PredictorState, PrefetchStats


class HintCollector(Collector):
    """One node's figures of hints and of what was loaded ahead.

    Args:
        hint_stats: the counters, as they are now.
        prefetch_stats: likewise.
        predictor_link: likewise.
        takeover_counts: likewise.
    """

    def __init__(
        self,
        hint_stats: Callable[[], HintStats],
        prefetch_stats: Callable[[], PrefetchStats],
        predictor_link: Callable[[], PredictorLink],
        takeover_counts: Callable[[], TakeoverCounts],
    ) -> None:
        self._hint_stats = hint_stats
        self._prefetch_stats = prefetch_stats
        self._predictor_link = predictor_link
        self._takeover_counts = takeover_counts

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """All of them."""
        stats = self._hint_stats()
        yield _by_label(
            telemetry.HINTS,
            "Hints by what became of them.",
            "fate",
            [
                ("taken", stats.taken),
                ("late", stats.late),
                ("invalid", stats.invalid),
                ("wrong_version", stats.wrong_version),
                ("overflow", stats.overflow),
                ("withheld", stats.withheld),
            ],
        )
        yield _by_label(
            telemetry.NODE_OBSERVATIONS,
            "Observations by what became of them.",
            "outcome",
            [("sent", stats.observations_sent), ("dropped", stats.observations_dropped)],
        )
        yield from _qualities(stats)
        yield _histogram(telemetry.HINT_LATENCY_SECONDS, "Observation handed over to hint received.", stats.latency)
        text = "Hint taken notice of to its layer's routing being known."
        yield _histogram(telemetry.HINT_TIME_UNTIL_USE_SECONDS, text, stats.time_until_use)
        yield self._prefetched()
        connected = float(self._predictor_link().state is PredictorState.CONNECTED)
        yield GaugeMetricFamily(telemetry.PREDICTOR_CONNECTED, "1 while the predictor is connected.", connected)
        counts = self._takeover_counts()
        yield _by_label(
            telemetry.PREDICTOR_TAKEOVERS,
            "Other predictors that were to take over, by what came of it.",
            "outcome",
            [("switched", counts.switched), ("refused", counts.refused), ("returned", counts.returned)],
        )

    def _prefetched(self) -> CounterMetricFamily:
        stats = self._prefetch_stats()
        return _by_label(
            telemetry.PREFETCHED_BYTES,
            "Bytes that were loaded before they were needed, by what became of them.",
            "outcome",
            [
                ("useful", stats.useful_bytes),
                ("late", stats.late_bytes),
                ("wasted", stats.wasted_bytes),
                ("streamed", stats.streamed_bytes),
            ],
        )


def _by_label(name: str, text: str, label: str, amounts: Sequence[tuple[str, int]]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, amount in amounts:
        family.add_metric([value], amount)
    return family


def _qualities(stats: HintStats) -> Iterator[CounterMetricFamily]:
    """What GoodPred is made of, over all layers."""
    totals: dict[tuple[str, str, str], list[int]] = {}
    for quality in stats.qualities:
        total = totals.setdefault((quality.version, str(quality.lookahead), quality.phase.value), [0, 0, 0])
        total[0] += quality.hinted
        total[1] += quality.correct
        total[2] += quality.ready
    for place, (name, text) in enumerate(
        (
            (telemetry.HINTED_EXPERTS, "Experts in the heads of hints."),
            (telemetry.HINTED_EXPERTS_ROUTED, "Hinted experts that were routed."),
            (telemetry.HINTED_EXPERTS_READY, "Hinted experts that were READY when the routing became known."),
        )
    ):
        family = CounterMetricFamily(name, text, labels=["version", "lookahead", "phase"])
        for labels, total in totals.items():
            family.add_metric(labels, total[place])
        yield family


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    """Prometheus's buckets are cumulative; the sum of the durations is not known."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip([*map(str, histogram.bounds_s), "+Inf"], histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=None)
