"""Prometheus's page says of hints and prefetched bytes what the node's own report says."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.hint_metrics import HintCollector
from compute_node.hint_quality import HintScores
from compute_node.hint_report import HintReport
from compute_node.takeovers import TakeoverCounts
from promoe.hint import Hint, StepSpan
from promoe.node_report import PredictorLink, PredictorState, PrefetchStats, StepPhase
from promoe.trace_events import HintEvent, HintFate, LayerEvent, StepEvent


def hint(layer: int, experts: list[int]) -> Hint:
    scores = np.full(len(experts), 0.5, np.float32)
    return Hint(1, layer, 1, 0, np.array(experts, np.uint16), scores, 2, "a@1")


@pytest.fixture
def report() -> HintReport:
    """Two layers hinted at lookahead 1 and 2, a late hint, and one that was pushed out."""
    scores, inbox = HintScores(3), HintInbox(1)
    scores(StepEvent(0.0, 1, (StepSpan("r", 1, False),)))
    for layer, experts in ((1, [4, 5]), (2, [6, 7])):
        scores(HintEvent(0.0, hint(layer, experts), HintFate.TAKEN, 0.0001))
    scores(HintEvent(0.0, hint(1, [1]), HintFate.LATE, 3.0))
    for layer in (1, 2):
        ids_TK = np.array([[4, 6]], np.uint16)
        scores(LayerEvent(0.03, 0.03, 1, layer, ids_TK, (4,), (6,), (), 0.0, ready=(4, 5)))
    for _ in range(2):
        inbox.put(ReceivedHint(hint(1, [1]), None))
    return HintReport(scores, inbox, None)


def test_the_report_names_every_fate_and_score(report: HintReport) -> None:
    stats = report.hint_stats()
    assert (stats.taken, stats.late, stats.invalid, stats.wrong_version, stats.overflow) == (2, 1, 0, 0, 1)
    assert [(q.layer, q.lookahead, q.phase, q.hinted, q.correct, q.ready) for q in stats.qualities] == [
        (1, 1, StepPhase.DECODE, 2, 1, 2),
        (2, 2, StepPhase.DECODE, 2, 1, 0),
    ]
    assert [q.found for q in stats.qualities] == [(1, 1), (1, 1)]
    assert (sum(stats.latency.counts), sum(stats.time_until_use.counts)) == (3, 2)
    assert len(stats.latency.counts) == len(stats.latency.bounds_s) + 1
    assert report.predictor_link() == PredictorLink("", PredictorState.NONE, None)
    assert report.takeover_counts() == TakeoverCounts()


def test_the_page_says_the_same(report: HintReport) -> None:
    registry = CollectorRegistry()
    link = PredictorLink("unix:p", PredictorState.CONNECTED, None)
    prefetch = PrefetchStats(useful_bytes=1, late_bytes=2, wasted_bytes=3, streamed_bytes=4, link_bytes_per_s=5.0)
    counts = TakeoverCounts(switched=3, refused=1, returned=2)
    registry.register(HintCollector(report.hint_stats, lambda: prefetch, lambda: link, lambda: counts))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"promoe_{name}", labels)

    for outcome, count in (("switched", 3), ("refused", 1), ("returned", 2)):
        assert value("predictor_takeovers_total", outcome=outcome) == count
    assert value("hints_total", fate="taken") == 2
    assert value("hints_total", fate="overflow") == 1
    assert value("node_observations_total", outcome="sent") == 0
    labels = {"version": "a@1", "phase": "decode"}
    assert value("hinted_experts_total", lookahead="1", **labels) == 2
    assert value("hinted_experts_routed_total", lookahead="2", **labels) == 1
    assert value("hinted_experts_ready_total", lookahead="1", **labels) == 2
    assert value("hint_latency_seconds_bucket", le="5e-05") == 0
    assert value("hint_latency_seconds_bucket", le="0.0001") == 2
    assert value("hint_latency_seconds_bucket", le="1.0") == 2
    assert value("hint_latency_seconds_bucket", le="+Inf") == 3
    assert value("hint_time_until_use_seconds_bucket", le="0.05") == 2
    outcomes = {outcome: value("prefetched_bytes_total", outcome=outcome) for outcome in ("useful", "late", "wasted")}
    assert outcomes == {"useful": 1, "late": 2, "wasted": 3}
    assert value("predictor_connected") == 1
