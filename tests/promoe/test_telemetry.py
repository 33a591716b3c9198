"""Metric names follow the glossary and the exporter's rules; logs say who speaks."""

import itertools
import logging
import re

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from promoe import telemetry
from promoe.telemetry import LATENCY_BUCKETS_S, configure_logging

METRIC_NAMES = {
    constant: value for constant, value in vars(telemetry).items() if constant.isupper() and isinstance(value, str)
}


def test_metric_names_say_what_their_constants_say() -> None:
    assert len(METRIC_NAMES) > 10
    assert len(set(METRIC_NAMES.values())) == len(METRIC_NAMES)
    for constant, name in METRIC_NAMES.items():
        assert re.fullmatch(r"promoe_[a-z]+(_[a-z]+)*", name)
        assert constant.lower() in name
        assert not name.endswith("_total"), "the client library adds it to counters"


@pytest.mark.parametrize("name", METRIC_NAMES.values())
def test_every_name_is_exported_as_it_is(name: str) -> None:
    registry = CollectorRegistry()
    Counter(name, "For this test.", registry=registry).inc()
    assert f"\n{name}_total 1.0\n" in generate_latest(registry).decode()


def test_latency_buckets_rise_from_a_millisecond_to_a_minute() -> None:
    assert all(low < high for low, high in itertools.pairwise(LATENCY_BUCKETS_S))
    assert (LATENCY_BUCKETS_S[0], LATENCY_BUCKETS_S[-1]) == (0.001, 60.0)
    assert max(high / low for low, high in itertools.pairwise(LATENCY_BUCKETS_S)) <= 3, "no decade without detail"
    registry = CollectorRegistry()
    histogram = Histogram(telemetry.TPOT_SECONDS, "For this test.", buckets=LATENCY_BUCKETS_S, registry=registry)
    histogram.observe(0.0125)
    assert f'{telemetry.TPOT_SECONDS}_bucket{{le="0.02"}} 1.0' in generate_latest(registry).decode()


def test_log_lines_say_time_level_process_and_logger(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("expert_store", "warning")
    logging.getLogger("expert_store.arena").warning("The disk is slow.")
    logging.getLogger("expert_store.arena").info("not at this level")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING expert_store expert_store\.arena: The disk is slow\.\n", err
    )
    assert root_logger.level == logging.WARNING


def test_configuring_twice_does_not_double_lines(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        configure_logging("compute_node", "info")
    logging.getLogger("compute_node").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert len(root_logger.handlers) == 1
