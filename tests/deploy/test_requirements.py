"""Each image installs what its service needs and nothing else, in the versions of the one lock."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.source_tree import ROOT, SERVICES, SourceModule, product_modules

FOLDER: Final = ROOT / "deploy/requirements"
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED: Final = {
    canonicalize_name(name)
    for name in re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
}
LIGHT: Final = ("expert_store", "predictor_service")
HEAVY: Final = frozenset({"torch", "transformers", "accelerate"})
DISTRIBUTION_OF: Final[Mapping[str, str]] = MappingProxyType(
    {"google": "protobuf", "grpc": "grpcio", "grpc_health": "grpcio-health-checking"}
    | {"grpc_reflection": "grpcio-reflection", "prometheus_client": "prometheus-client"}
)
START: Final = """
import importlib.metadata, sys
{imports}
tops = {{name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}}
print(*sorted(tops - sys.stdlib_module_names))
"""


def listed(service: str) -> set[str]:
    """The names in the service's list."""
    return {canonicalize_name(line) for line in (FOLDER / f"{service}.txt").read_text().split()}


def closure(names: Iterable[str]) -> set[str]:
    """With everything that they require, as installed here."""
    seen: set[str] = set()
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in seen:
            seen.add(name)
            wanted = map(Requirement, importlib.metadata.distribution(name).requires or ())
            pending += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return seen


def distributions(top_level_names: Iterable[str]) -> set[str]:
    """Of what is imported; our own modules aside."""
    ours = {"promoe", *SERVICES}
    return {
        canonicalize_name(DISTRIBUTION_OF.get(name, name))
        for name in top_level_names
        if name not in ours and name not in sys.stdlib_module_names and not name.startswith("_")
    }


@cache
def loaded_at_start(service: str) -> set[str]:
    """The distributions that the running service has loaded, plug-ins included."""
    plugins = [path.partition(":")[0] for path in PROJECT["entry-points"]["promoe.predictors"].values()]
    modules = [f"{service}.__main__", "promoe.health_probe", *(plugins if service == "predictor_service" else ())]
    code = START.format(imports="\n".join(f"import {module}" for module in modules))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    installed = importlib.metadata.packages_distributions()
    # gRPC looks for its compiler, and does without.
    return distributions(name for name in done.stdout.split() if name in installed and name != "grpc_tools")


def imported_later(service: str) -> set[str]:
    """What the modules that start imports bring along import within their functions, types aside."""
    modules = {module.name: module for module in product_modules() if module.package == service}
    pending, reached = [f"{service}.__main__"], set[str]()
    while pending:
        name = pending.pop()
        if name in modules and name not in reached:
            reached.add(name)
            pending += [part for each in modules[name].imported_names for part in (each, each.rpartition(".")[0])]
    return distributions(name for module in map(modules.__getitem__, reached) for name in _tops(module))


def _tops(module: SourceModule) -> Iterable[str]:
    return (name.partition(".")[0] for name in module.imported_names)


@pytest.mark.parametrize("service", SERVICES)
def test_every_name_has_its_version_in_the_lock(service: str) -> None:
    assert listed(service) <= LOCKED
    assert closure(listed(service)) <= LOCKED


@pytest.mark.parametrize("service", LIGHT)
def test_a_light_image_has_all_that_its_service_loads(service: str) -> None:
    needed = loaded_at_start(service) | imported_later(service)
    assert needed - closure(listed(service)) == set()


@pytest.mark.parametrize("service", LIGHT)
def test_a_light_image_has_nothing_that_its_service_does_not_load(service: str) -> None:
    assert listed(service) - (loaded_at_start(service) | imported_later(service)) == set()


@pytest.mark.parametrize("service", LIGHT)
def test_a_light_image_has_no_torch(service: str) -> None:
    assert closure(listed(service)) & HEAVY == set()


def test_the_nodes_image_has_what_the_project_asks_for() -> None:
    assert listed("compute_node") == {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}


def test_images_take_every_version_from_the_lock() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip (?:--python \S+ )?install (.*?)(?: &&|$)", dockerfile, re.MULTILINE)
    unpinned = [each for each in installs if "requirements.lock" not in each and "--no-deps" not in each]
    assert len(installs) >= len(SERVICES)
    assert unpinned == []
