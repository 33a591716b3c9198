"""Compiled and interpreted placement decide the same, and nothing stale is run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compute_node.compilation import Execution, execution
from tests.source_tree import ROOT, product_modules

MODULES = [Path(line) for line in (ROOT / "compute_node/compiled_modules.txt").read_text().split()]
needs_compiled = pytest.mark.skipif(
    execution() is Execution.INTERPRETED, reason="nothing is compiled here: there is no C compiler, or make interpreted"
)


def copied_tree(folder: Path, without_extensions: bool) -> dict[str, str]:
    """The packages that are compiled in a folder of their own, and the environment that prefers them."""
    ignore = shutil.ignore_patterns("__pycache__", *(["*.so"] if without_extensions else []))
    shutil.copytree(ROOT / "compute_node", folder / "compute_node", ignore=ignore)
    shutil.copytree(ROOT / "proto/promoe", folder / "promoe", ignore=ignore)
    return {**os.environ, "PYTHONPATH": str(folder)}


def walked(seed: int, environment: dict[str, str]) -> tuple[str, str]:
    """What was decided, and how the code ran."""
    script = ROOT / "tests/compute_node/placement_walk.py"
    done = subprocess.run(
        [sys.executable, script, str(seed)], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout, done.stderr


@needs_compiled
@pytest.mark.parametrize("seed", range(3))
def test_compiled_code_decides_what_interpreted_code_decides(tmp_path: Path, seed: int) -> None:
    interpreted, how = walked(seed, copied_tree(tmp_path, without_extensions=True))
    assert how == Execution.INTERPRETED.value
    compiled, how = walked(seed, dict(os.environ))
    assert how == Execution.COMPILED.value
    assert len(compiled.splitlines()) > 1000
    assert compiled == interpreted


@needs_compiled
def test_a_source_that_was_changed_after_it_was_compiled_is_told_of(tmp_path: Path) -> None:
    environment = copied_tree(tmp_path, without_extensions=False)
    with (tmp_path / "compute_node/slots.py").open("a") as source:
        source.write("\n")
    command = [sys.executable, "-m", "compute_node.replay", "nowhere.trace"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "older than their sources" in done.stderr
    assert "make setup" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_compiled_needs_no_torch() -> None:
    """Analysing torch would take minutes of every set-up."""
    known = {module.name: module for module in product_modules()}
    pending = [module.name for module in known.values() if Path(module.path) in MODULES]
    assert len(pending) == len(MODULES), "what is listed exists"
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        for imported in known[name].imported_names:
            assert imported.partition(".")[0] != "torch", f"{name} is imported by what is compiled"
            found = imported if imported in known else imported.rpartition(".")[0]
            if found in known and found not in seen:
                seen.add(found)
                pending.append(found)


@needs_compiled
def test_all_that_is_listed_is_compiled() -> None:
    for path in MODULES:
        assert list((ROOT / path).parent.glob(f"{path.stem}.*.so")), f"{path} is compiled"


@needs_compiled
@pytest.mark.parametrize("first", ["compute_node.slots", "compute_node.expert_cache"])
def test_it_can_be_told_whoever_is_imported_first(first: str) -> None:
    script = f"import {first}\nfrom compute_node.compilation import execution\nprint(execution().value)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == Execution.COMPILED.value, done.stderr
