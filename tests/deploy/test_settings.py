"""The settings that containers are started with are ones that the services know."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
import yaml

from compute_node.config import ComputeConfig
from expert_store.config import StoreConfig
from predictor_service.config import PredictorConfig
from promoe.config import Settings
from tests.deploy.compose_files import COMPOSE_FILES, DEPLOY, load_compose

TABLES: Final[Mapping[str, tuple[str, type]]] = MappingProxyType(
    {
        "expert-store": ("store", StoreConfig),
        "predictor": ("predictor", PredictorConfig),
        "predictor-green": ("predictor", PredictorConfig),
        "compute-node": ("compute", ComputeConfig),
    }
)
COMMANDS: Final = tuple(
    (file, service, definition["command"])
    for file in COMPOSE_FILES
    for service, definition in load_compose(file)["services"].items()
    if service in TABLES and "command" in definition
)


@pytest.mark.parametrize(("file", "service", "command"), COMMANDS)
def test_every_command_line_is_one_that_its_service_understands(file: str, service: str, command: list[str]) -> None:
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in command]
    assert plain[:2] == ["--config", "/etc/promoe/promoe.toml"]
    assert set(plain[2::2]) == {"--set"}
    section, config_type = TABLES[service]
    assert isinstance(Settings(DEPLOY / "promoe.toml", plain[3::2]).section(section, config_type), config_type)


@pytest.mark.parametrize("service", ["expert-store", "predictor", "compute-node"])
def test_the_clusters_settings_are_ones_that_the_services_know(service: str) -> None:
    section, config_type = TABLES[service]
    settings = Settings(DEPLOY / "k8s/base/promoe.toml", [])
    assert isinstance(settings.section(section, config_type), config_type)


@pytest.mark.parametrize("path", [DEPLOY / "promoe.toml", DEPLOY / "k8s/base/promoe.toml"], ids=str)
def test_every_api_that_a_node_has_is_listened_on_in_its_container(path: Path) -> None:
    compute = tomllib.loads(path.read_text())["compute"]
    assert compute["listen"] == "0.0.0.0:50051"
    if "http_listen" in ComputeConfig.__dataclass_fields__:
        assert compute["http_listen"] == "0.0.0.0:8080"


def test_every_variable_of_the_compose_files_is_explained() -> None:
    used = {name for file in COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", (DEPLOY / file).read_text())}
    explained = dict(re.findall(r"^#(\w+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    assert used == set(explained)
    defaults = {
        (name, value)
        for file in COMPOSE_FILES
        for name, value in re.findall(r"\$\{(\w+):-([^${}]*)\}", (DEPLOY / file).read_text())
    }
    assert {(name, value) for name, value in defaults if explained[name] != value} == set()


def test_health_is_asked_where_the_service_listens() -> None:
    listens = tomllib.loads((DEPLOY / "promoe.toml").read_text())
    services = load_compose("compose.yaml")["services"]
    probed = {name: services[name]["healthcheck"]["test"][-1] for name in ("expert-store", "predictor", "compute-node")}
    assert probed["expert-store"] == f"unix:{listens['store']['run_dir']}/store.sock"
    assert probed["predictor"] == listens["predictor"]["listen"]
    assert probed["compute-node"].rpartition(":")[2] == listens["compute"]["listen"].rpartition(":")[2]
    pods = yaml.safe_load_all((DEPLOY / "k8s/base/node.yaml").read_text())
    store = next(iter(pods))["spec"]["template"]["spec"]["initContainers"][0]
    cluster = tomllib.loads((DEPLOY / "k8s/base/promoe.toml").read_text())
    assert store["livenessProbe"]["exec"]["command"][-1] == f"unix:{cluster['store']['run_dir']}/store.sock"
