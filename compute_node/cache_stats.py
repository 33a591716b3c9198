"""Counts what the expert cache did: by phase, by layer, and for each request in the step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from compute_node.acquisition import Acquisition
from compute_node.step_ledger import ExpertUse, Phase, StepLedger, TokenSpan
from promoe import telemetry
from promoe.trace_events import LoadEvent, LoadReason, TraceEvent

_AHEAD: Final = (LoadReason.PREFETCH, LoadReason.STREAM)


@dataclass
class PhaseCounters:
    """Since the start, for one phase. An access is one expert needed by one layer in one step.

    Attributes:
        ahead_nbytes: loaded before anybody waited, those that were late among them, by reason.
    """

    hits: int = 0
    misses: int = 0
    steps: int = 0
    tokens: int = 0
    stall_s: float = 0.0
    demand_nbytes: int = 0
    late_prefetches: int = 0
    late_prefetch_stall_s: float = 0.0
    ahead_nbytes: dict[LoadReason, int] = field(default_factory=lambda: dict.fromkeys(_AHEAD, 0))


@dataclass(frozen=True)
class _LayerUse:
    """What one layer asked for, or the part of it that one phase answers for."""

    hits: int
    misses: int
    late: int
    loaded_nbytes: int
    late_nbytes: int
    stall_s: float
    late_stall_s: float

    def shared(self, share: float, hits: int, misses: int, late: int) -> "_LayerUse":
        """With other counts, and a share of bytes and stall."""
        return _LayerUse(
            hits=hits,
            misses=misses,
            late=late,
            loaded_nbytes=int(self.loaded_nbytes * share),
            late_nbytes=int(self.late_nbytes * share),
            stall_s=self.stall_s * share,
            late_stall_s=self.late_stall_s * share,
        )


class CacheMetrics(Collector):
    """The same counters for Prometheus, labelled by phase (and cause), read when the page is asked for.

    Attributes:
        phases: written by the engine thread.
    """

    def __init__(self) -> None:
        self.phases = {phase: PhaseCounters() for phase in Phase}

    @classmethod
    def register(cls, registry: CollectorRegistry) -> "CacheMetrics":
        """Names by the glossary."""
        metrics = cls()
        registry.register(metrics)
        return metrics

    def collect(self) -> Iterator[CounterMetricFamily]:
        """All of them."""
        hits = CounterMetricFamily(telemetry.HITS, "Routed experts that were READY.", labels=["phase"])
        misses = CounterMetricFamily(telemetry.MISSES, "Routed experts that were not.", labels=["phase", "cause"])
        loaded = CounterMetricFamily(
            telemetry.LOADED_BYTES, "Bytes that experts were loaded with.", labels=["phase", "reason"]
        )
        stall = CounterMetricFamily(telemetry.STALL_SECONDS, "Time compute waited.", labels=["phase", "cause"])
        for phase, counters in self.phases.items():
            late_stall_s = counters.late_prefetch_stall_s
            hits.add_metric([phase.value], counters.hits)
            misses.add_metric([phase.value, "absent"], counters.misses - counters.late_prefetches)
            misses.add_metric([phase.value, "late_prefetch"], counters.late_prefetches)
            loaded.add_metric([phase.value, LoadReason.DEMAND.value], counters.demand_nbytes)
            for reason, nbytes in counters.ahead_nbytes.items():
                loaded.add_metric([phase.value, reason.value], nbytes)
            stall.add_metric([phase.value, "demand_load"], max(0.0, counters.stall_s - late_stall_s))
            stall.add_metric([phase.value, "late_prefetch"], late_stall_s)
        yield from (hits, misses, loaded, stall)


@dataclass
class StepRecorder:
    """Told of every layer by the experts function, and of loads by the expert cache; runs on the engine thread.

    Attributes:
        ledger: which request owns which row.
        metrics: holds the counters, and tells Prometheus of them.
        take_compute_stall_s: seconds that compute waited since the last call, given what the host waited; the device's.
        is_counting: false until `begin`.
    """

    ledger: StepLedger
    metrics: CacheMetrics
    take_compute_stall_s: Callable[[float], float]
    is_counting: bool = False
    # Demand loads that arrived since the last layer: what became urgent on its way was asked for as a prefetch.
    _demanded_nbytes: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def phases(self) -> Mapping[Phase, PhaseCounters]:
        """The counters, as they are now."""
        return self.metrics.phases

    def _count_step(self, spans: tuple[TokenSpan, ...]) -> None:
        for phase, counters in self.phases.items():
            tokens = sum(span.num_tokens for span in spans if span.phase is phase)
            counters.tokens += tokens
            counters.steps += 1 if tokens else 0

    def begin(self) -> None:
        """Counts from here: what start-up did (trying the engine) is nobody's use."""
        self.is_counting = True

    def __call__(self, event: TraceEvent) -> None:
        """A sink of the expert cache: bytes that were loaded ahead count for the phase of the step they arrive in."""
        if not isinstance(event, LoadEvent) or event.is_paused:
            return
        if event.reason is LoadReason.DEMAND:
            self._demanded_nbytes[event.expert.expert] = event.nbytes
        elif self.is_counting and self.ledger.spans:
            self.phases[_phase_of(self.ledger.spans)].ahead_nbytes[event.reason] += event.nbytes

    def record_layer(self, acquisition: Acquisition, ids_TK: np.ndarray) -> None:
        """Attributes one layer's hits, misses, bytes and stall.

        In a step of both phases an expert that both need counts in each; bytes and stall are the layer's, shared by
        the phases' share of accesses.
        """
        use = self._use_of(acquisition)
        self._demanded_nbytes.clear()
        spans = self.ledger.spans
        if not spans or not self.is_counting:
            return
        if acquisition.layer == 0:
            self._count_step(spans)
        missing = set(acquisition.misses)
        phases = {span.phase for span in spans}
        if len(phases) == 1:
            self._count_phase(phases.pop(), use)
        else:
            self._count_mixed(spans, acquisition, ids_TK, use)
        self._count_requests(spans, acquisition, ids_TK, missing)

    def _use_of(self, acquisition: Acquisition) -> _LayerUse:
        host_wait_s = acquisition.stall_s
        acquisition.stall_s = self.take_compute_stall_s(host_wait_s)
        num_misses, num_late = len(acquisition.misses), len(acquisition.late)
        # What compute waited for is known by cause where the host waits too; on CUDA it is known a layer later at that.
        late_share = num_late / num_misses if num_misses else 0.0
        if host_wait_s > 0:
            late_share = acquisition.late_stall_s / host_wait_s
        return _LayerUse(
            hits=len(acquisition.hits),
            misses=num_misses,
            late=num_late,
            loaded_nbytes=acquisition.loaded_nbytes,
            late_nbytes=sum(self._demanded_nbytes.get(expert, 0) for expert in acquisition.late),
            stall_s=acquisition.stall_s,
            late_stall_s=late_share * acquisition.stall_s,
        )

    def _count_phase(self, phase: Phase, use: _LayerUse) -> None:
        counters = self.phases[phase]
        counters.hits += use.hits
        counters.misses += use.misses
        counters.late_prefetches += use.late
        counters.stall_s += use.stall_s
        counters.late_prefetch_stall_s += use.late_stall_s
        counters.demand_nbytes += use.loaded_nbytes
        counters.ahead_nbytes[LoadReason.PREFETCH] += use.late_nbytes

    def _count_mixed(
        self, spans: tuple[TokenSpan, ...], acquisition: Acquisition, ids_TK: np.ndarray, use: _LayerUse
    ) -> None:
        needed: dict[Phase, set[int]] = {phase: set() for phase in Phase}
        for span, experts in _experts_by_span(spans, ids_TK):
            needed[span.phase] |= experts
        accesses = sum(len(experts) for experts in needed.values())
        for phase, experts in needed.items():
            misses = len(experts.intersection(acquisition.misses))
            late = len(experts.intersection(acquisition.late))
            share = len(experts) / max(1, accesses)
            self._count_phase(phase, use.shared(share, len(experts) - misses, misses, late))

    def _count_requests(
        self, spans: tuple[TokenSpan, ...], acquisition: Acquisition, ids_TK: np.ndarray, missing: set[int]
    ) -> None:
        if len(spans) == 1:
            use = self.ledger.use_of(spans[0].request_id).of(spans[0].phase)
            _add_use(use, acquisition, len(acquisition.hits), len(acquisition.misses))
            return
        for span, experts in _experts_by_span(spans, ids_TK):
            misses = len(experts & missing)
            use = self.ledger.use_of(span.request_id).of(span.phase)
            _add_use(use, acquisition, len(experts) - misses, misses)


def _phase_of(spans: tuple[TokenSpan, ...]) -> Phase:
    return Phase.PREFILL if any(span.phase is Phase.PREFILL for span in spans) else Phase.DECODE


def _add_use(use: ExpertUse, acquisition: Acquisition, hits: int, misses: int) -> None:
    use.hits += hits
    use.misses += misses
    use.loaded_nbytes += acquisition.loaded_nbytes
    use.stall_s += acquisition.stall_s


def _experts_by_span(spans: tuple[TokenSpan, ...], ids_TK: np.ndarray) -> list[tuple[TokenSpan, set[int]]]:
    """Rows beyond the spans are padding and belong to nobody."""
    result: list[tuple[TokenSpan, set[int]]] = []
    row = 0
    for span in spans:
        rows_SK = ids_TK[row : row + span.num_tokens]
        row += span.num_tokens
        result.append((span, set(rows_SK.reshape(-1).tolist())))
    return result
