"""The architecture holds: every rule of `architecture_rules` over every module, and rules over the whole tree."""

import graphlib
import re
import subprocess
import sys
from typing import Final

import pytest

from tests import architecture_rules as rules
from tests.source_tree import PRODUCT_FOLDERS, ROOT, SourceModule, modules_of_tests, product_modules, texts

TORCH_FREE_PACKAGES: Final = ("promoe", "expert_store", "predictor_service")

BAD_SAMPLES: Final = (
    (rules.imports_no_other_service, "compute_node/a.py", "import expert_store.arena"),
    (rules.imports_no_other_service, "proto/promoe/cli/up.py", "from compute_node import engine"),
    (rules.imports_no_other_service, "expert_store/a.py", "def f():\n    from compute_node.engine import Engine"),
    (rules.keeps_wire_types_at_the_edge, "compute_node/engine.py", "from promoe.v1 import inference_pb2"),
    (rules.keeps_wire_types_at_the_edge, "expert_store/a.py", "import promoe.v1.model_pb2_grpc"),
    (rules.keeps_torch_out_of_light_services, "expert_store/arena.py", "def f():\n    import torch"),
    (rules.keeps_torch_out_of_light_services, "predictor_service/predictors/a.py", "from torch import nn"),
    (rules.flows_in_one_direction, "compute_node/engine.py", "from compute_node.service import Service"),
    (rules.flows_in_one_direction, "compute_node/engine.py", "import compute_node.__main__"),
    (rules.flows_in_one_direction, "compute_node/engine.py", "from compute_node.node import ComputeNode"),
    (rules.flows_in_one_direction, "proto/promoe/rpc.py", "from promoe.cli.app import main"),
    (rules.reads_config_at_the_root_only, "compute_node/engine.py", "from promoe.config import Settings"),
    (rules.is_named_after_what_it_defines, "compute_node/utils.py", ""),
    (rules.is_named_after_what_it_defines, "compute_node/cache/lru.py", ""),
    (rules.is_named_after_what_it_defines, "compute_node/a.py", "class Cache: ..."),
    (rules.keeps_its_sizes, "compute_node/a.py", "x = 1\n" * (rules.MAX_FILE_LINES + 1)),
    (rules.keeps_its_sizes, "compute_node/a.py", "def f():\n" + "    x = 1\n" * rules.MAX_FUNCTION_LINES),
    (rules.keeps_its_sizes, "compute_node/a.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g): ..."),
    (rules.keeps_packages_empty, "compute_node/__init__.py", "from compute_node.engine import Engine"),
    (rules.imports_absolutely, "compute_node/a.py", "from . import engine"),
    (rules.imports_absolutely, "compute_node/a.py", "from promoe.ids import *"),
    (rules.imports_absolutely, "compute_node/a.py", "import pickle"),
    (rules.imports_absolutely, "compute_node/a.py", "from typing import Any"),
    (rules.prints_nothing, "compute_node/a.py", "print(1)"),
    (rules.catches_what_it_can_name, "compute_node/a.py", "def f():\n  try: g()\n  except Exception: pass"),
    (
        rules.catches_what_it_can_name,
        "compute_node/a.py",
        "def f():\n  try: g()\n  except (OSError, BaseException): pass",
    ),
    (rules.catches_what_it_can_name, "compute_node/a.py", "try: import x\nexcept: pass"),
    (rules.holds_no_state_at_import, "compute_node/a.py", "SLOTS = {}"),
    (rules.holds_no_state_at_import, "compute_node/a.py", "slots: dict[int, int] = {}"),
    (rules.holds_no_state_at_import, "compute_node/a.py", "import threading\nlock = threading.Lock()"),
    (rules.holds_no_state_at_import, "compute_node/a.py", "def f():\n    global x"),
    (rules.holds_no_state_at_import, "compute_node/a.py", "if True:\n    register('promoe', f)"),
    (rules.names_experts_one_way, "compute_node/a.py", "def f(layer: int, expert: int): ..."),
    (rules.names_experts_one_way, "compute_node/a.py", "def f(experts: list[tuple[int, int]]): ..."),
    (rules.measures_intervals_monotonically, "compute_node/a.py", "import time\nstart = time.time()"),
    (rules.mocks_nothing, "tests/test_a.py", "from unittest.mock import Mock"),
)

GOOD_SAMPLES: Final = (
    (rules.imports_no_other_service, "expert_store/a.py", "from expert_store import arena\nfrom promoe import ids"),
    (rules.keeps_wire_types_at_the_edge, "compute_node/store_client.py", "from promoe.v1 import model_pb2"),
    (rules.keeps_torch_out_of_light_services, "expert_store/pack/convert.py", "import torch"),
    (rules.flows_in_one_direction, "compute_node/__main__.py", "from compute_node.service import Service"),
    (rules.flows_in_one_direction, "compute_node/node.py", "from compute_node.service import Service"),
    (rules.keeps_its_sizes, "compute_node/a.py", "class A:\n    def f(self, a, b, c, d, *, e, f): ..."),
    (rules.keeps_packages_empty, "proto/promoe/__init__.py", "from promoe.client import Client"),
    (rules.prints_nothing, "tests/bench/bench_pack.py", "print(1)"),
    (
        rules.catches_what_it_can_name,
        "compute_node/a.py",
        "def f():\n  try: g()\n  except BaseException:\n    h()\n    raise",
    ),
    (rules.holds_no_state_at_import, "compute_node/a.py", "POLICIES: Final = {'lru': lru}\nlogger = getLogger()"),
    (rules.holds_no_state_at_import, "compute_node/__main__.py", "if __name__ == '__main__':\n    main()"),
    (rules.names_experts_one_way, "compute_node/a.py", "def f(expert: ExpertId): ..."),
    (rules.measures_intervals_monotonically, "compute_node/a.py", "import time\nstarted_unix_s = time.time()"),
)


@pytest.mark.parametrize("rule", rules.PRODUCT_RULES, ids=lambda rule: rule.__name__)
def test_product_keeps_the_rule(rule: rules.Rule) -> None:
    assert [f"{module.path} {sentence}" for module in product_modules() for sentence in rule(module)] == []


@pytest.mark.parametrize("rule", rules.TEST_RULES, ids=lambda rule: rule.__name__)
def test_tests_keep_the_rule(rule: rules.Rule) -> None:
    assert [f"{module.path} {sentence}" for module in modules_of_tests() for sentence in rule(module)] == []


@pytest.mark.parametrize(("rule", "path", "source"), BAD_SAMPLES)
def test_the_rule_bites(rule: rules.Rule, path: str, source: str) -> None:
    assert list(rule(SourceModule(path, source)))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD_SAMPLES)
def test_the_rule_lets_good_code_pass(rule: rules.Rule, path: str, source: str) -> None:
    assert list(rule(SourceModule(path, source))) == []


def test_no_rule_is_untested() -> None:
    assert {sample[0] for sample in BAD_SAMPLES} == {*rules.PRODUCT_RULES, *rules.TEST_RULES}


def test_modules_import_each_other_in_one_direction() -> None:
    modules = {module.name: module for module in product_modules()}
    graph = {
        name: {target for imported in module.imported_names for target in (imported, imported.rpartition(".")[0])}
        & (modules.keys() - {name, module.package})
        for name, module in modules.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert set(order) == set(modules)


@pytest.mark.parametrize("package", TORCH_FREE_PACKAGES)
def test_starting_a_light_service_or_the_cli_loads_no_torch(package: str) -> None:
    names = [
        module.name
        for module in product_modules()
        if module.package == package and not module.is_in(*rules.TORCH_FOLDERS)
    ]
    script = f"import sys, {', '.join(names)}; print(*({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_no_package_registry_is_named() -> None:
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
    hosts += [".".join(parts) for parts in (("anaconda", "org"), ("ghcr", "io"), ("docker", "io"), ("quay", "io"))]
    hosts += [".".join(parts) for parts in (("nvcr", "io"), ("npmjs", "org"), ("pypi", "nvidia", "com"))]
    assert [(path, host) for path, text in texts() for host in hosts if host in text] == []


def test_no_path_of_one_machine_is_named() -> None:
    folders = "|".join(("work", "root", "opt", "home", "Users"))
    machine_path = re.compile(rf"(?<![\w.$}}~/*-])/({folders})/\w")
    # A container's own paths are the same on every machine.
    found = [(path, hit.group()) for path, text in texts() for hit in machine_path.finditer(text)]
    assert [hit for hit in found if "Dockerfile" not in hit[0] and not hit[0].startswith("deploy/")] == []


def test_every_rpc_says_who_may_retry() -> None:
    protos = sorted((ROOT / "proto/promoe/v1").glob("*.proto"))
    silent = [
        f"{path.name}: {rpc}"
        for path in protos
        for comment, rpc in re.findall(r"((?:^ *//.*\n)*) *rpc (\w+)\(", path.read_text(), re.MULTILINE)
        if not re.search("idempotent|retried|retries", comment, re.IGNORECASE)
    ]
    assert protos
    assert silent == []


def test_every_product_folder_is_packaged_and_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for folder in PRODUCT_FOLDERS:
        if (ROOT / folder / "__init__.py").is_file():
            assert f'"{folder.rpartition("/")[2]}*"' in project, f"{folder} is not packaged"


def test_the_proof_is_at_least_four_fifths_of_the_product() -> None:
    num_product = sum(module.num_written_lines for module in product_modules())
    num_test = sum(m.num_written_lines for m in modules_of_tests() if not m.is_in(rules.BENCH_FOLDER))
    assert num_test >= 0.8 * num_product, f"{num_test} lines of tests for {num_product} lines of product"
