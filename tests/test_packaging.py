"""What is installed is what is locked, what is locked is what is asked for, and commands are the same everywhere."""

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
import tomllib
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.source_tree import ROOT, SERVICES, product_modules

PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES: Final = tuple(
    line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
)
LOCKED: Final = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LOCK_LINES)}
LOWEST_SUPPORTED: Final = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-tools")
MAKE_TARGETS: Final = (
    *("demo", "test", "test-compose", "check", "bench"),
    *("bench-overhead", "bench-sweep", "bench-predictors", "bench-device", "bench-pack", "bench-store"),
)


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, CUDA's extras aside."""
    return [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


def applies(requirement: Requirement) -> bool:
    """True on this interpreter, without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


@pytest.mark.parametrize("line", LOCK_LINES)
def test_every_line_of_the_lock_is_one_exact_version(line: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)


def test_the_lock_names_everything_once_and_torch_first() -> None:
    assert len(LOCKED) == len(LOCK_LINES)
    assert LOCK_LINES[0].startswith("torch==")


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_the_lock_satisfies_what_the_project_asks_for(requirement: Requirement) -> None:
    assert Version(LOCKED[canonicalize_name(requirement.name)]) in requirement.specifier


def test_everything_that_the_product_imports_is_asked_for() -> None:
    asked = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    # Optional: CUDA's packages and OpenTelemetry's, which extras bring.
    ours = {*sys.stdlib_module_names, "promoe", *SERVICES, "cuda", "google", "opentelemetry"}
    imported = {name.partition(".")[0] for module in product_modules() for name in module.imported_names} - ours
    distributions = importlib.metadata.packages_distributions()
    known = {name: {canonicalize_name(each) for each in distributions.get(name, ())} for name in imported}
    assert {name: found for name, found in known.items() if not found & asked} == {}


@pytest.mark.parametrize("name", sorted(LOCKED.keys() - {"torch"}))
def test_the_lock_is_closed_under_requirements(name: str) -> None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here; `make setup` installs the lock")
    if distribution.version != LOCKED[canonicalize_name(name)]:
        pytest.skip(f"{name} {distribution.version} is installed here; `make setup` installs the lock")
    for requirement in map(Requirement, distribution.requires or ()):
        if applies(requirement):
            locked = LOCKED.get(canonicalize_name(requirement.name))
            assert locked is not None, f"{name} needs {requirement}, which is not locked"
            assert requirement.specifier.contains(locked, prereleases=True), f"{name} needs {requirement}"


def test_nothing_of_cuda_is_locked() -> None:
    assert [name for name in LOCKED if re.match("nvidia|cuda|cupy|triton", name)] == []


@pytest.mark.parametrize("name", LOWEST_SUPPORTED)
def test_generated_code_is_made_by_the_lowest_supported_grpc(name: str) -> None:
    lower_bounds = [
        Version(specifier.version)
        for requirement in direct_requirements()
        if requirement.name == name
        for specifier in requirement.specifier
        if specifier.operator in (">=", "==")
    ]
    locked = Version(LOCKED[canonicalize_name(name)])
    assert lower_bounds
    assert (locked.major, locked.minor) == (lower_bounds[0].major, lower_bounds[0].minor)
    stub = (ROOT / "proto/promoe/v1/inference_pb2_grpc.py").read_text()
    assert f"GRPC_GENERATED_VERSION = '{locked}'" in stub


def test_generated_code_runs_on_every_protobuf_that_is_allowed() -> None:
    header = (ROOT / "proto/promoe/v1/inference_pb2.py").read_text()
    generated_by = re.search(r"# Protobuf Python Version: ([0-9.]+)", header)
    assert generated_by is not None
    (protobuf,) = [requirement for requirement in direct_requirements() if requirement.name == "protobuf"]
    lowest = [Version(specifier.version) for specifier in protobuf.specifier if specifier.operator == ">="]
    assert lowest == [Version(generated_by.group(1))]


def test_the_console_script_exists_and_is_installed() -> None:
    assert PROJECT["scripts"] == {"promoe": "promoe.cli.app:main"}
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "promoe"]
    assert callable(script.load())


def test_data_that_the_product_reads_is_packaged() -> None:
    promoe = importlib.resources.files("promoe")
    for name in ("py.typed", "v1/inference.proto", "v1/inference_pb2.pyi", "cli/prompts.txt"):
        assert promoe.joinpath(name).is_file(), name
    demo_model = importlib.resources.files("expert_store.demo_model")
    for name in ("delta.safetensors", "config.json"):
        assert demo_model.joinpath(name).is_file(), name


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True, env=_plain_environment()
    )
    if target.startswith("bench-"):
        assert f"-m tests.bench.{target.replace('-', '_')}" in done.stdout
        assert (ROOT / "tests/bench" / f"{target.replace('-', '_')}.py").is_file()
    else:
        assert done.stdout.strip()


def test_setting_up_starts_with_torchs_exact_version() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "setup"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=_plain_environment(),
    )
    steps = [line for line in done.stdout.splitlines() if " install " in line]
    assert "torch==" in steps[0]
    assert steps[1].endswith("install -r requirements.lock")
    assert steps[2].endswith("install --no-deps --no-build-isolation --editable .")


def test_the_ci_script_runs_the_same_commands_as_people() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    stages = ["make setup", "make check", "make test", "env PROMOE_INSTALL_ENGINE=1 make test-compose"]
    assert re.findall(r"^stage \w+ (.*)$", script, re.MULTILINE) == ["browser", *stages]
    assert "set -euo pipefail" in script


def test_hooks_need_nothing_but_the_environment() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", hooks) == ["local"]
    assert set(re.findall(r"language: (\S+)", hooks)) == {"system"}


def _plain_environment() -> dict[str, str]:
    """Without what an outer make passes on."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
