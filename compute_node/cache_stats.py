"""Counts what the expert cache did: by phase, by layer, and for each request in the step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import CollectorRegistry, Counter

from compute_node.acquisition import Acquisition
from compute_node.step_ledger import ExpertUse, Phase, StepLedger, TokenSpan
from promoe import telemetry


@dataclass
class PhaseCounters:
    """Since the start, for one phase. An access is one expert needed by one layer in one step."""

    hits: int = 0
    misses: int = 0
    steps: int = 0
    tokens: int = 0
    stall_s: float = 0.0
    demand_nbytes: int = 0


@dataclass(frozen=True)
class CacheMetrics:
    """The same counters for Prometheus, labelled by phase (and cause)."""

    hits: Counter
    misses: Counter
    loaded_bytes: Counter
    stall_seconds: Counter

    @classmethod
    def register(cls, registry: CollectorRegistry) -> "CacheMetrics":
        """Names by the glossary."""
        return cls(
            hits=Counter(telemetry.HITS, "Routed experts that were READY.", ["phase"], registry=registry),
            misses=Counter(telemetry.MISSES, "Routed experts that were not.", ["phase", "cause"], registry=registry),
            loaded_bytes=Counter(
                telemetry.LOADED_BYTES, "Bytes asked from the link.", ["phase", "reason"], registry=registry
            ),
            stall_seconds=Counter(
                telemetry.STALL_SECONDS, "Time compute waited.", ["phase", "cause"], registry=registry
            ),
        )


@dataclass
class StepRecorder:
    """Told of every layer by the experts function; runs on the engine thread.

    Attributes:
        ledger: which request owns which row.
        metrics: Prometheus counters.
        take_compute_stall_s: seconds that compute itself waited since the last call, from the device.
        is_counting: false until `begin`.
    """

    ledger: StepLedger
    metrics: CacheMetrics
    take_compute_stall_s: Callable[[], float]
    is_counting: bool = False
    phases: dict[Phase, PhaseCounters] = field(default_factory=lambda: {phase: PhaseCounters() for phase in Phase})

    def _count_step(self, spans: tuple[TokenSpan, ...]) -> None:
        for phase, counters in self.phases.items():
            tokens = sum(span.num_tokens for span in spans if span.phase is phase)
            counters.tokens += tokens
            counters.steps += 1 if tokens else 0

    def begin(self) -> None:
        """Counts from here: what start-up did (trying the engine) is nobody's use."""
        self.is_counting = True

    def record_layer(self, acquisition: Acquisition, ids_TK: np.ndarray) -> None:
        """Attributes one layer's hits, misses, bytes and stall.

        In a step of both phases an expert that both need counts in each; bytes and stall are the layer's, shared by
        the phases' share of accesses.
        """
        acquisition.stall_s += self.take_compute_stall_s()
        spans = self.ledger.spans
        if not spans or not self.is_counting:
            return
        if acquisition.layer == 0:
            self._count_step(spans)
        missing = set(acquisition.misses)
        phases = {span.phase for span in spans}
        if len(phases) == 1:
            self._count_phase(phases.pop(), acquisition, len(acquisition.hits), len(acquisition.misses), 1.0)
        else:
            self._count_mixed(spans, acquisition, ids_TK, missing)
        self._count_requests(spans, acquisition, ids_TK, missing)

    def _count_phase(self, phase: Phase, acquisition: Acquisition, hits: int, misses: int, share: float) -> None:
        counters = self.phases[phase]
        nbytes, stall_s = int(acquisition.loaded_nbytes * share), acquisition.stall_s * share
        counters.hits += hits
        counters.misses += misses
        counters.stall_s += stall_s
        counters.demand_nbytes += nbytes
        self.metrics.hits.labels(phase.value).inc(hits)
        if misses:
            self.metrics.misses.labels(phase.value, "absent").inc(misses)
        # Not only with misses: a step of both phases shares its bytes, and on CUDA a wait's end is known a layer later.
        if nbytes:
            self.metrics.loaded_bytes.labels(phase.value, "demand").inc(nbytes)
        if stall_s:
            self.metrics.stall_seconds.labels(phase.value, "demand_load").inc(stall_s)

    def _count_mixed(
        self, spans: tuple[TokenSpan, ...], acquisition: Acquisition, ids_TK: np.ndarray, missing: set[int]
    ) -> None:
        needed: dict[Phase, set[int]] = {phase: set() for phase in Phase}
        for span, experts in _experts_by_span(spans, ids_TK):
            needed[span.phase] |= experts
        accesses = sum(len(experts) for experts in needed.values())
        for phase, experts in needed.items():
            misses = len(experts & missing)
            self._count_phase(phase, acquisition, len(experts) - misses, misses, len(experts) / max(1, accesses))

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
