"""Where Prometheus's own checker is: installed, or taken out of Debian's package without installing a service."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

_FETCH_DEADLINE_S: Final = 120.0


def find_promtool(folder: Path) -> str:
    """The program; skips the test where there is none. CI on Debian fetches the package into `folder`."""
    installed = shutil.which("promtool")
    if installed is not None:
        return installed
    if os.environ.get("CI") != "true" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("promtool is not installed here; Debian has it in its package prometheus")
    try:
        for command in (("apt-get", "update", "-qq"), ("apt-get", "download", "-qq", "prometheus")):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_FETCH_DEADLINE_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"promtool is not installed here, and Debian's package cannot be fetched: {error}")
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return str(folder / "usr/bin/promtool")
