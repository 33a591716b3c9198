"""What the compose files promise, file by file; compose itself reads every combination where it is installed."""

import itertools
import os
import re
import shutil
import subprocess
from typing import Final

import pytest

from tests.deploy.compose_files import COMPOSE_FILES, DEPLOY, OVERLAYS, load_compose

COMBINATIONS: Final = tuple(
    ("compose.yaml", *overlays)
    for count in range(len(OVERLAYS) + 1)
    for overlays in itertools.combinations(OVERLAYS, count)
)
OURS: Final = ("expert-store", "predictor", "compute-node", "promoe")


def has_compose() -> bool:
    """Whether docker's client and its compose are here; an engine is not needed."""
    asked = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    return bool(asked and asked.returncode == 0)


def test_compose_reads_every_combination() -> None:
    if not has_compose():
        pytest.skip("docker compose is not installed here; `make test-compose` installs it where it may")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PROMOE_")}
    for files in COMBINATIONS:
        arguments = [word for file in files for word in ("--file", str(DEPLOY / file))]
        command = ["docker", "compose", *arguments, "--profile", "tools", "config", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
        assert (done.returncode, done.stderr) == (0, ""), files


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_every_published_port_is_on_loopback(file: str) -> None:
    ports = [port for service in load_compose(file)["services"].values() for port in service.get("ports", ())]
    assert [port for port in ports if not re.match(r"127\.0\.0\.1:\$\{PROMOE_\w+_PORT:-\d+\}:\d+$", str(port))] == []


@pytest.mark.parametrize("service", OURS)
def test_every_container_of_ours_may_do_next_to_nothing(service: str) -> None:
    definition = load_compose("compose.yaml")["services"][service]
    assert definition["read_only"] is True
    assert definition["init"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user", "pid", "ipc", "devices"} & definition.keys()


@pytest.mark.parametrize("service", ["expert-store", "predictor", "compute-node"])
def test_every_service_has_a_limit_without_swap_a_health_and_time_to_drain(service: str) -> None:
    definition = load_compose("compose.yaml")["services"][service]
    assert definition["mem_limit"] == definition["memswap_limit"]
    assert definition["restart"] == "unless-stopped"
    assert {"healthcheck", "stop_grace_period"} <= definition.keys()


def test_only_the_node_sees_both_sockets() -> None:
    services = load_compose("compose.yaml")["services"]
    seen = {name: {str(each).partition(":")[0] for each in services[name]["volumes"]} for name in OURS}
    assert {name for name in OURS if "store-sockets" in seen[name]} == {"expert-store", "compute-node"}
    assert {name for name in OURS if "predictor-sockets" in seen[name]} == {"predictor", "compute-node", "promoe"}


def test_a_pack_is_written_by_the_command_line_only() -> None:
    services = load_compose("compose.yaml")["services"]
    packs = {name: [each for each in services[name]["volumes"] if ":/data/packs" in str(each)] for name in OURS}
    assert {name for name, (mount,) in packs.items() if not mount.endswith(":ro")} == {"promoe"}


def test_only_the_node_gets_the_gpu() -> None:
    assert set(load_compose("compose.gpu.yaml")["services"]) == {"compute-node"}
    others = [file for file in COMPOSE_FILES if file != "compose.gpu.yaml"]
    assert [file for file in others if "nvidia" in (DEPLOY / file).read_text()] == []


def test_ci_changes_nothing_but_how_builds_reach_the_network() -> None:
    services = load_compose("compose.ci.yaml")["services"]
    assert {
        name: definition for name, definition in services.items() if definition != {"build": {"network": "host"}}
    } == {}
    assert set(services) == set(OURS)
