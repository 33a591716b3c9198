"""Metrics have the glossary's names and count what happened."""

import pytest
from prometheus_client import CollectorRegistry

from compute_node.request_metrics import Outcome, RequestMetrics, TokenKind
from compute_node.step_ledger import Phase
from promoe import telemetry


def test_every_observation_is_found_under_its_name() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    metrics.observe_step(Phase.PREFILL, 0.5)
    metrics.observe_step(Phase.DECODE, 0.25)
    metrics.observe_load(3, 4)
    metrics.observe_queue(0.125)
    metrics.observe_first_token(1.0)
    metrics.observe_next_token(2.0)
    metrics.observe_tpot(4.0)
    metrics.count_tokens(TokenKind.PROMPT, 7)
    metrics.count_tokens(TokenKind.OUTPUT, 1)
    metrics.count_request(Outcome.DEADLINE)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value(f"{telemetry.STEP_SECONDS}_sum", phase="prefill") == 0.5
    assert value(f"{telemetry.STEP_SECONDS}_sum", phase="decode") == 0.25
    assert value(telemetry.RUNNING_REQUESTS) == 3
    assert value(telemetry.QUEUED_REQUESTS) == 4
    assert value(f"{telemetry.QUEUE_SECONDS}_sum") == 0.125
    assert value(f"{telemetry.TTFT_SECONDS}_sum") == 1.0
    assert value(f"{telemetry.ITL_SECONDS}_sum") == 2.0
    assert value(f"{telemetry.TPOT_SECONDS}_sum") == 4.0
    assert value(f"{telemetry.TOKENS}_total", kind="prompt") == 7
    assert value(f"{telemetry.TOKENS}_total", kind="output") == 1
    assert value(f"{telemetry.REQUESTS}_total", outcome="deadline") == 1


@pytest.mark.parametrize("outcome", list(Outcome))
def test_outcomes_that_have_not_happened_are_there_with_zero(outcome: Outcome) -> None:
    registry = CollectorRegistry()
    RequestMetrics(registry)
    assert registry.get_sample_value(f"{telemetry.REQUESTS}_total", {"outcome": outcome.value}) == 0


def test_sums_for_live_figures_are_those_of_the_histograms() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry)
    metrics.observe_first_token(0.5)
    for gap_s in (0.1, 0.2):
        metrics.observe_next_token(gap_s)
    times = metrics.token_times
    assert (times.num_first, times.ttft_s, times.num_next) == (1, 0.5, 2)
    assert times.next_s == pytest.approx(registry.get_sample_value("promoe_itl_seconds_sum"))
