"""Where Prometheus's own checker is: installed, or taken out of Debian's package without installing a service."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def find_promtool(folder: Path) -> str:
    """The program; skips the test where there is none. CI on Debian fetches the package into `folder`."""
    installed = shutil.which("promtool")
    if installed is not None:
        return installed
    if os.environ.get("CI") != "true" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("promtool is not installed here; Debian has it in its package prometheus")
    # `_apt` may not write below the tests' private folder, and apt says so on standard error.
    subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)
    subprocess.run(["apt-get", "download", "-qq", "prometheus"], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return str(folder / "usr/bin/promtool")
