"""What a figure measured on a GPU must be read with: which GPU, which driver, which CUDA, which link."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Final

import torch

from tests.bench.report import package_version

SMI_FIELDS: Final = (
    "name",
    "driver_version",
    "memory.total",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "clocks.max.sm",
    "power.limit",
)
CUDA_PACKAGES: Final = ("cuda-bindings", "cupy-cuda12x", "cupy-cuda13x", "accelerate", "triton")


def gpu_facts() -> dict[str, object] | None:
    """None where torch can use no CUDA device."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "torch_cuda": torch.version.cuda,
        "smi": _smi(),
        "driver_line": _first_line(Path("/proc/driver/nvidia/version")),
        "kernel": platform.release(),
        "packages": {name: package_version(name) for name in CUDA_PACKAGES},
    }


def _smi() -> dict[str, str]:
    """As nvidia-smi says; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False))


def _first_line(path: Path) -> str | None:
    return path.read_text().splitlines()[0] if path.is_file() else None
