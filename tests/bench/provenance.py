"""What a figure was measured on: hardware, versions, commit and load, for the JSON that is kept beside it."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from tests.running_store import ROOT


def provenance(disk_path: Path) -> dict[str, object]:
    """Of this machine at this moment.

    Args:
        disk_path: a path on the disk that is measured.
    """
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "num_cpus": os.cpu_count(),
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "kernel": platform.release(),
        "file_system": _mount_of(disk_path),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("promoe", "grpcio", "xxhash")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_files": len(_git("status", "--porcelain").splitlines()),
    }


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _field(path: Path, name: str) -> str:
    lines = path.read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def _mount_of(path: Path) -> str:
    """Device and type of the mount that holds the path."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [
        (target, f"{device} ({kind})") for device, target, kind in mounts if path.resolve().is_relative_to(target)
    ]
    return max(holding, key=lambda found: len(found[0]))[1]
