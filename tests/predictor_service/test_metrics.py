"""The Prometheus page shows the sessions' figures under the contract's names."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from predictor_service.metrics import metrics_page
from predictor_service.session_book import PredictorStats
from promoe import telemetry
from promoe.errors import AlreadyRunning
from promoe.hint import ObservedKind, PredictorVersion

VERSION = PredictorVersion("frequency@1", "frequency", ObservedKind.NONE, (4,), True, True)
STATS = PredictorStats(
    active=VERSION,
    sessions=2,
    observations=70,
    dropped_observations=5,
    refused_observations=3,
    hints=60,
    unsent_hints=4,
    predict_s=0.25,
)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_page_shows_every_figure() -> None:
    address = free_address()
    with metrics_page(lambda: STATS, address), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    samples = {sample.name: (sample.value, sample.labels) for family in families for sample in family.samples}
    assert samples[f"{telemetry.PREDICTOR}_info"] == (1.0, {"version": "frequency@1", "predictor": "frequency"})
    assert samples[telemetry.PREDICTOR_SESSIONS][0] == 2
    for name, value in (
        (telemetry.OBSERVATIONS, 70),
        (telemetry.DROPPED_OBSERVATIONS, 5),
        (telemetry.REFUSED_OBSERVATIONS, 3),
        (telemetry.PREDICTOR_HINTS, 60),
        (telemetry.UNSENT_HINTS, 4),
        (telemetry.PREDICT_SECONDS, 0.25),
    ):
        assert samples[f"{name}_total"][0] == value


def test_no_address_means_no_page_and_a_taken_one_is_told() -> None:
    with metrics_page(lambda: STATS, ""):
        pass
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(AlreadyRunning, match="metrics page cannot listen"),
        metrics_page(lambda: STATS, f"127.0.0.1:{server.getsockname()[1]}"),
    ):
        pass
