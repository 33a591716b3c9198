"""Dashboard and alerts ask for what the services really export, and Prometheus's own checker agrees with them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest
import yaml

from promoe import telemetry
from tests.deploy.promtool import find_promtool
from tests.source_tree import ROOT

OBSERVE: Final = ROOT / "deploy/observe"
DASHBOARD: Final = json.loads((OBSERVE / "grafana/promoe.json").read_text())
PANELS: Final = tuple(panel for panel in DASHBOARD["panels"] if panel["type"] != "row")
EXPRESSIONS: Final = tuple(target["expr"] for panel in PANELS for target in panel["targets"])
ALERTS: Final = tuple(
    rule for group in yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"] for rule in group["rules"]
)
GRID_WIDTH: Final = 24
SUFFIXES: Final = ("_total", "_bucket", "_sum", "_count")


def metric_names(expression: str) -> set[str]:
    """The names of our metrics in it, without what the client library adds."""
    names = set(re.findall(r"\bpromoe_\w+", expression))
    return {re.sub(f"({'|'.join(SUFFIXES)})$", "", name) for name in names}


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> str:
    return find_promtool(Path(tmp_path_factory.mktemp("promtool")))


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *(rule["expr"] for rule in ALERTS)])
def test_only_what_the_services_export_is_asked_for(expression: str) -> None:
    exported = {value for value in vars(telemetry).values() if isinstance(value, str) and value.startswith("promoe_")}
    assert metric_names(expression)
    assert metric_names(expression) <= exported


def test_the_dashboard_shows_the_measures_of_the_design() -> None:
    shown = {name for expression in EXPRESSIONS for name in metric_names(expression)}
    measures = {
        *(telemetry.TTFT_SECONDS, telemetry.ITL_SECONDS, telemetry.TPOT_SECONDS, telemetry.TOKENS),
        *(telemetry.HITS, telemetry.MISSES, telemetry.STALL_SECONDS),
        *(telemetry.LOADED_BYTES, telemetry.PREFETCHED_BYTES, telemetry.LINK_BUSY_SECONDS),
        *(telemetry.HINTED_EXPERTS, telemetry.HINTED_EXPERTS_ROUTED, telemetry.HINTED_EXPERTS_READY),
    }
    assert measures <= shown


def test_the_dashboard_has_a_row_for_each_process() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Compute node", "Predictor", "Expert store"]


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < GRID_WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_says_what_it_shows_and_asks_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((OBSERVE / "grafana/datasources.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert [panel["title"] for panel in PANELS if not panel["description"]] == []


def test_every_process_is_scraped_where_compose_opens_its_page() -> None:
    jobs = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in jobs for static in job["static_configs"] for target in static["targets"]}
    observe = (ROOT / "deploy/compose.observe.yaml").read_text()
    ports = set(re.findall(r"metrics_listen=0\.0\.0\.0:(\d+)", observe))
    assert targets == {"expert-store:9101", "predictor:9102", "compute-node:9103"}
    assert ports == {target.partition(":")[2] for target in targets}


def test_alerts_have_tests() -> None:
    tests = yaml.safe_load((OBSERVE / "alerts_test.yml").read_text())["tests"]
    tried = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert tried == {rule["alert"] for rule in ALERTS}


def test_promtool_reads_the_configuration(promtool: str) -> None:
    _run(promtool, "check", "config", str(OBSERVE / "prometheus.yml"))


def test_promtool_passes_the_alerts_tests(promtool: str) -> None:
    _run(promtool, "test", "rules", str(OBSERVE / "alerts_test.yml"))


def test_promtool_reads_every_expression_of_the_dashboard(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:{place}", "expr": expression.replace("$__rate_interval", "1m")}
        for place, expression in enumerate(EXPRESSIONS)
    ]
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    _run(promtool, "check", "rules", str(path))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
