"""What every benchmark writes down: its command, the machine, the versions, the commit, and raw numbers."""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from compute_node.compilation import execution

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "tests" / "bench" / "results"


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing, in the order they were taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Robust against the neighbours of a shared machine."""
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"median": self.median, "min": min(self.values), "max": max(self.values), "values": list(self.values)}


def median_ratio(measured: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of the ratios of neighbours in one interleaved run: a slow minute slows both of a pair."""
    return statistics.median(ours / theirs for ours, theirs in zip(measured, baseline, strict=True))


def environment() -> dict[str, object]:
    """Where and with what this process measures."""
    return {
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("PROMOE_COMMIT", ""),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("promoe", "torch", "transformers", "grpcio")},
        "gpu": _gpu(),
        "placement": execution().value,
    }


def write_report(name: str, measured: dict[str, object], out: Path | None) -> Path:
    """Writes `NAME.json` with the environment; returns where."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, **environment(), **measured}, indent=1) + "\n")
    return path


def out_argument(parser: argparse.ArgumentParser) -> None:
    """`--out PATH`, the same for every benchmark."""
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: tests/bench/results")


def package_version(name: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _gpu() -> dict[str, object] | None:
    """A benchmark that has not loaded torch measures no GPU, and its own memory instead."""
    if "torch" not in sys.modules:
        return None
    from tests.bench.gpu_facts import gpu_facts

    return gpu_facts()


def _git(*arguments: str) -> str:
    """Empty in a copy of the tree without its history."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
