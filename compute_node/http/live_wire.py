"""A node at one moment as one JSON document, for live views: counters since the start, from which they make rates.

Says nothing of what was asked or answered.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter

from compute_node.admission import OpenRequest
from compute_node.http.answer_wire import JsonDocument
from compute_node.http.node_parts import NodeParts
from compute_node.node_report import NodeReport
from promoe.cache_map import CacheMap
from promoe.node_report import CacheStats, HintStats, PhaseStats, PredictorLink, StepPhase


def live_document(parts: NodeParts) -> JsonDocument:
    """All of it; on the event loop, where it takes about a millisecond."""
    report, admission = parts.watch.report, parts.admission
    stats = report.reporter.cache_stats(admission.num_running, admission.num_queued)
    return {
        "at_s": perf_counter(),
        "node": _node(report, stats, admission.refusal),
        "phases": {"prefill": _phase(stats.prefill), "decode": _phase(stats.decode)},
        "bytes": _nbytes_by_reason(stats),
        "hints": _hints(stats.hints),
        "times": asdict(parts.watch.times),
        "map": _map(report.reporter.cache_map()),
        "requests": _requests(admission.open_requests()),
        "store": {"state": report.reporter.store_link().state.value},
        "predictor": _predictor(report.reporter.predictor_link()),
    }


def _node(report: NodeReport, stats: CacheStats, refusal: str | None) -> JsonDocument:
    identity, shape = report.identity, stats.shape
    return {
        "instance_id": identity.instance_id,
        "model": identity.model.name,
        "device": identity.device.kind,
        "device_name": identity.device.name,
        "emulated_link_bytes_per_s": identity.device.emulated_link_bytes_per_s,
        "engine": identity.engine.value,
        "policy": shape.policy,
        "cache_rate": shape.cache_rate,
        "refusal": refusal,
        "running_requests": stats.running_requests,
        "queued_requests": stats.queued_requests,
    }


def _phase(phase: PhaseStats) -> JsonDocument:
    return {
        "hits": phase.hits,
        "misses": phase.misses,
        "steps": phase.steps,
        "tokens": phase.tokens,
        "stall_s": phase.stall_s,
        "late_prefetch_stall_s": phase.late_prefetch_stall_s,
    }


def _nbytes_by_reason(stats: CacheStats) -> JsonDocument:
    """What was uploaded, why, and what became of what was loaded ahead; see CacheStats."""
    demand_nbytes = stats.prefill.demand_bytes + stats.decode.demand_bytes
    prefetch = stats.prefetch
    return {
        "uploaded": stats.uploaded_bytes,
        "demand": demand_nbytes,
        # What arrives between two of the counters' moments may be in one and not yet in the other.
        "prefetch": max(0, stats.uploaded_bytes - demand_nbytes - prefetch.streamed_bytes),
        "streamed": prefetch.streamed_bytes,
        "useful": prefetch.useful_bytes,
        "late": prefetch.late_bytes,
        "wasted": prefetch.wasted_bytes,
        "link_bytes_per_s": prefetch.link_bytes_per_s,
    }


def _hints(hints: HintStats) -> JsonDocument:
    """Their fates, and for each version and lookahead the counts over layers that accuracy and fetch rate come from."""
    sums: dict[tuple[str, int], list[int]] = {}
    for quality in hints.qualities:
        if quality.phase is StepPhase.DECODE:
            counts = sums.setdefault((quality.version, quality.lookahead), [0, 0, 0])
            for place, count in enumerate((quality.hinted, quality.correct, quality.ready)):
                counts[place] += count
    return {
        "taken": hints.taken,
        "late": hints.late,
        "dropped": hints.invalid + hints.wrong_version + hints.overflow,
        "qualities": [
            {"version": version, "lookahead": lookahead, "hinted": hinted, "correct": correct, "ready": ready}
            for (version, lookahead), (hinted, correct, ready) in sorted(sums.items())
        ],
    }


def _map(cache_map: CacheMap) -> JsonDocument:
    return {
        "layers": cache_map.num_moe_layers,
        "experts": cache_map.num_experts,
        "step": cache_map.step,
        "layer": cache_map.layer,
        # ExpertBits, a byte for every expert, layer by layer.
        "states": base64.b64encode(cache_map.experts).decode(),
    }


def _requests(requests: Sequence[OpenRequest]) -> list[JsonDocument]:
    return [
        {
            "id": request.request_id,
            "state": "running" if request.is_running else "queued",
            "prompt_tokens": request.num_prompt_tokens,
            "output_tokens": request.num_output_tokens,
            "max_output_tokens": request.max_output_tokens,
            "age_s": request.age_s,
        }
        for request in requests
    ]


def _predictor(link: PredictorLink) -> JsonDocument:
    return {
        "endpoint": link.endpoint,
        "state": link.state.value,
        "version": None if link.active is None else link.active.version,
    }
