"""What a compute node refuses to be asked for, before anything is loaded."""

import dataclasses
import math
from pathlib import Path

import pytest

from compute_node.config import ComputeConfig


def config(**settings: object) -> ComputeConfig:
    return ComputeConfig(pack=Path("p"), store_endpoint="unix:s", **settings)  # type: ignore[arg-type]


def refusal(**settings: object) -> str:
    with pytest.raises(ValueError, match=r"^compute\.") as refused:
        config(**settings)
    return str(refused.value)


NUMBERS = sorted(
    field.name
    for field in dataclasses.fields(ComputeConfig)
    if field.type in (int, float, int | None, float | None) and field.name != "cache_rate"
)

MAY_BE_NONE = {"max_queued_requests", "drain_deadline_s", "predictor_trial_s"}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_every_number_is_bounded(name: str, value: float) -> None:
    assert refusal(**{name: value}).startswith(f"compute.{name} is {value}; allowed: ")


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - MAY_BE_NONE))
def test_what_cannot_be_none_at_all_is_above_zero(name: str) -> None:
    assert refusal(**{name: 0}) == f"compute.{name} is 0; allowed: above 0"


def test_nobody_needs_to_wait_to_drain_or_to_be_on_trial() -> None:
    assert all(getattr(config(**{name: 0}), name) == 0 for name in MAY_BE_NONE)


@pytest.mark.parametrize(
    "name",
    ["max_concurrent_requests", "max_queued_requests", "max_prompt_bytes", "chunk_bytes", "max_chunks_in_flight"],
)
def test_what_get_info_reports_fits_its_fields(name: str) -> None:
    most = 2**32 - 1
    config(**{name: most})
    assert refusal(**{name: most + 1}) == f"compute.{name} is {most + 1}; allowed: up to {most}"


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_a_cache_rate_is_a_share(rate: float) -> None:
    assert refusal(cache_rate=rate) == f"compute.cache_rate is {rate}; allowed: above 0, up to 1"


def test_slots_are_said_once() -> None:
    assert "say the same thing; give one of them" in refusal(cache_rate=0.5, expert_slots=4)


@pytest.mark.parametrize("listen", ["nowhere", "127.0.0.1:", "127.0.0.1:65536", ":-1", ":9000"])
def test_a_metrics_address_has_a_host_and_a_port(listen: str) -> None:
    assert refusal(metrics_listen=listen) == f"compute.metrics_listen is {listen!r}; expected host:port"


@pytest.mark.parametrize("endpoint", ["collector:4317", "http://collector", "grpc://collector:4317", "http:// x:1"])
def test_a_collector_has_a_scheme_and_a_port(endpoint: str) -> None:
    expected = f"compute.otlp_endpoint is {endpoint!r}; expected http://host:port or https://host:port"
    assert refusal(otlp_endpoint=endpoint) == expected
    assert config(otlp_endpoint="https://[::1]:4317").otlp_endpoint == "https://[::1]:4317"


@pytest.mark.parametrize("listen", ["", "127.0.0.1:65535"])
def test_a_metrics_page_is_optional(listen: str) -> None:
    assert config(metrics_listen=listen).metrics_listen == listen


@pytest.mark.parametrize("endpoint", ["somewhere", "127.0.0.1", "127.0.0.1:65536", ":9000"])
def test_a_predictor_is_somewhere(endpoint: str) -> None:
    expected = f"compute.predictor_endpoint is {endpoint!r}; expected unix:PATH or host:port"
    assert refusal(predictor_endpoint=endpoint) == expected


@pytest.mark.parametrize("endpoint", ["", "unix:/run/predictor.sock", "127.0.0.1:50061"])
def test_a_predictor_is_optional(endpoint: str) -> None:
    assert config(predictor_endpoint=endpoint).predictor_endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint", ["unix:", "nowhere", ":1", "host:port", "host:65536", "unix:/a\nb", "unix:/" + "a" * 300]
)
def test_what_no_predictor_can_be_at_is_refused(endpoint: str) -> None:
    assert "expected unix:PATH or host:port" in refusal(predictor_endpoint=endpoint)
