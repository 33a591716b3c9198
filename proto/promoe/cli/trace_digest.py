"""A whole trace in one record: what `promoe trace stats` shows and prints as JSON."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from promoe.cli.routing_statistics import LayerRouting, lru_hit_rate, mean, reuse_distances, routing_statistics
from promoe.cli.trace_routing import PhaseTotals, RoutingCollector, TokenRouting
from promoe.cli.trace_traffic import LoadTotals, TrafficCollector
from promoe.trace_events import LayerEvent
from promoe.trace_file import TraceReader
from promoe.trace_header import TraceHeader


@dataclass(frozen=True)
class PhaseDigest:
    """One phase. `lru_hit_rates`: of per-layer LRU, by layer and cache rate."""

    name: str
    tokens: int
    steps: int
    hits: int
    misses: int
    late: int
    stall_s: float
    hit_rate: float | None
    layers: tuple[LayerRouting, ...]
    mean: LayerRouting
    lru_hit_rates: tuple[tuple[float | None, ...], ...]
    mean_lru_hit_rates: tuple[float | None, ...]


@dataclass(frozen=True)
class HintDigest:
    """One version's hints at one lookahead in one phase."""

    version: str
    lookahead: int
    phase: str
    hints: int
    accuracy: float | None
    recall: float | None
    latency_s: float | None
    latency_p99_s: float | None


@dataclass(frozen=True)
class TraceDigest:
    """Everything. `cache_rates`: those of the LRU hit rates; `hidden`: which hidden states were recorded."""

    header: TraceHeader
    file_nbytes: int
    events: int
    is_complete: bool
    dropped_steps: int
    requests: int
    duration_s: float
    hidden: str
    cache_rates: tuple[float, ...]
    prefill: PhaseDigest
    decode: PhaseDigest
    loads: dict[str, LoadTotals]
    fates: dict[str, int]
    hints: tuple[HintDigest, ...]


def digest_trace(reader: TraceReader, cache_rates: Sequence[float]) -> TraceDigest:
    """Reads the trace once, without its hidden states.

    Raises:
        InvalidInput: the file is damaged.
    """
    model = reader.header.model
    collector, traffic = RoutingCollector(model.num_moe_layers), TrafficCollector(model.num_moe_layers)
    for step in reader.steps(hidden=False):
        collector.add_all(step)
        traffic.add_all(step)
    prefill, decode = collector.routing(model.experts_per_token)
    histograms = [reuse_distances(accesses, model.num_experts) for accesses in collector.accesses]
    slots = [round(rate * model.num_experts) for rate in cache_rates]
    return TraceDigest(
        header=reader.header,
        file_nbytes=reader.path.stat().st_size,
        events=reader.summary.num_events,
        is_complete=reader.summary.is_complete,
        dropped_steps=reader.summary.dropped_steps,
        requests=collector.num_requests,
        duration_s=collector.end_s,
        hidden=_hidden_kinds(reader),
        cache_rates=tuple(cache_rates),
        prefill=_digest_phase(
            "prefill",
            prefill,
            collector.prefill_totals,
            model.num_experts,
            [_hit_rates(h[0], slots) for h in histograms],
        ),
        decode=_digest_phase(
            "decode", decode, collector.decode_totals, model.num_experts, [_hit_rates(h[1], slots) for h in histograms]
        ),
        loads={reason.value: totals for reason, totals in traffic.loads.items()},
        fates={fate.value: count for fate, count in traffic.fates.items()},
        hints=tuple(_digest_hints(traffic)),
    )


def _digest_phase(
    name: str,
    routing: TokenRouting,
    totals: PhaseTotals,
    num_experts: int,
    lru_hit_rates: list[tuple[float | None, ...]],
) -> PhaseDigest:
    layers = routing_statistics(routing, num_experts)
    return PhaseDigest(
        name=name,
        tokens=routing.num_tokens,
        steps=totals.steps,
        hits=totals.hits,
        misses=totals.misses,
        late=totals.late,
        stall_s=totals.stall_s,
        hit_rate=totals.hit_rate,
        layers=tuple(layers),
        mean=_mean_layer(layers),
        lru_hit_rates=tuple(lru_hit_rates),
        mean_lru_hit_rates=tuple(mean(rates) for rates in zip(*lru_hit_rates, strict=True)),
    )


def _mean_layer(layers: Sequence[LayerRouting]) -> LayerRouting:
    return LayerRouting(
        entropy=mean([layer.entropy for layer in layers]),
        busiest_share=mean([layer.busiest_share for layer in layers]),
        overlap=mean([layer.overlap for layer in layers]),
        chance_overlap=mean([layer.chance_overlap for layer in layers]),
        frequency=mean([layer.frequency for layer in layers]),
        transition=tuple(mean(recalls) for recalls in zip(*(layer.transition for layer in layers), strict=True)),
    )


def _hit_rates(histogram: np.ndarray, slots: Iterable[int]) -> tuple[float | None, ...]:
    return tuple(lru_hit_rate(histogram, num_slots) for num_slots in slots)


def _digest_hints(traffic: TrafficCollector) -> Iterator[HintDigest]:
    for group, totals in sorted(traffic.hints.items(), key=lambda item: (item[0].version, item[0].lookahead)):
        yield HintDigest(
            version=group.version,
            lookahead=group.lookahead,
            phase="prefill" if group.is_prefill else "decode",
            hints=totals.hints,
            accuracy=totals.accuracy,
            recall=totals.recall,
            latency_s=totals.latency_s(50),
            latency_p99_s=totals.latency_s(99),
        )


def _hidden_kinds(reader: TraceReader) -> str:
    """Looks at the first layer that was recorded."""
    first = next((event for event in reader if isinstance(event, LayerEvent)), None)
    if first is None or not first.rows:
        return "none"
    recorded = {"layer input": first.layer_input_RD, "router input": first.router_input_RD}
    return " and ".join(name for name, hidden_RD in recorded.items() if hidden_RD is not None)
