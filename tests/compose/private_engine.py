"""A container engine of the tests' own, from nothing but Debian 12's package mirror: no registry, no firewall rule.

Rehearsed on Debian 12 as root. The engine is Debian 13's (Debian 12's has no compose v2), installed through a private
apt configuration that leaves the machine's own alone; the base image is made by mmdebstrap and imported under the name
that the Dockerfile asks for. Everything lives in one folder and goes with it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.compose.stage_times import timed

BASE_IMAGE: Final = "python:3.11-slim"

_APT_SOURCES: Final = Path("/etc/apt/sources.list.d/debian.sources")
_CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_MERGED_USR_HOOKS: Final = Path("/usr/share/mmdebstrap/hooks/merged-usr")
_APT_INSTALL: Final = ("apt-get", "install", "-y", "-qq", "--no-install-recommends")
# runc stays Debian 12's: Debian 13's needs a newer libc.
_ENGINE_PACKAGES: Final = (".".join(("docker", "io")), "docker-cli", "docker-buildx", "docker-compose")
_UNREAD_FOLDERS: Final = ("man", "doc", "locale")
_START_DEADLINE_S: Final = 30.0
_STOP_DEADLINE_S: Final = 30.0
_POLL_S: Final = 0.1


class NoEngine(Exception):
    """A step on the way to an engine failed; its output is in the text."""


def can_be_installed() -> bool:
    """As root of a Debian 12."""
    return os.geteuid() == 0 and _APT_SOURCES.is_file() and "bookworm" in _APT_SOURCES.read_text()


@contextmanager
def private_engine(folder: Path) -> Iterator[Mapping[str, str]]:
    """Installs and starts an engine with a base image; gives the environment that makes docker's client find it.

    Args:
        folder: new, with room for some gigabytes, and a path short enough for a unix socket.

    Raises:
        NoEngine: it cannot be had here.
    """
    folder.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(1) as beside:
            with timed("what makes the base image is installed"):
                environment = _apt_environment(folder / "apt")
                _run("apt-get", "update", "-qq", environment=environment)
                _run(*_APT_INSTALL, "mmdebstrap", environment=environment)
            base = beside.submit(_make_base, folder)
            with timed("the engine is installed"):
                _run(*_APT_INSTALL, *(f"{package}/trixie" for package in _ENGINE_PACKAGES), environment=environment)
            with timed("the base image is made beside it"):
                rootfs = base.result()
        with _running(folder) as environment:
            with timed("the base image is imported"):
                _run("docker", "import", str(rootfs), BASE_IMAGE, environment=environment)
            rootfs.unlink()
            yield environment
    finally:
        _unmount_below(folder)
        shutil.rmtree(folder)


def _apt_environment(apt: Path) -> Mapping[str, str]:
    """In which apt knows Debian 13's packages, too, and leaves the machine's own lists alone."""
    for name in ("lists/partial", "parts", "preferences"):
        (apt / name).mkdir(parents=True)
    sources = _APT_SOURCES.read_text()
    (apt / "parts/debian.sources").write_text(sources)
    (apt / "parts/trixie.sources").write_text(sources.replace("bookworm", "trixie"))
    (apt / "preferences/trixie").write_text("Package: *\nPin: release n=trixie*\nPin-Priority: 100\n")
    configuration = apt / "apt.conf"
    configuration.write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{apt / "parts"}";\n'
        f'Dir::Etc::preferencesparts "{apt / "preferences"}";\n'
        f'Dir::State::lists "{apt / "lists"}";\n'
    )
    return {**os.environ, "APT_CONFIG": str(configuration), "DEBIAN_FRONTEND": "noninteractive"}


def _make_base(folder: Path) -> Path:
    """A root file system like the Dockerfile's base: Debian and Python, with this machine's certificates for pip."""
    rootfs = folder / "base.tar"
    unread = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNREAD_FOLDERS]
    pip_conf = f"[global]\\ncert = {_CERTIFICATES}\\n"
    _run(
        *("mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io", *unread),
        *(f"--hook-dir={_MERGED_USR_HOOKS}", "--include=usr-is-merged,python3-venv,ca-certificates"),
        f'--customize-hook=cp {_CERTIFICATES} "$1{_CERTIFICATES}"',
        f"--customize-hook=printf '{pip_conf}' > \"$1/etc/pip.conf\"",
        *("bookworm", str(rootfs), str(_APT_SOURCES)),
        environment=os.environ,
    )
    return rootfs


@contextmanager
def _running(folder: Path) -> Iterator[Mapping[str, str]]:
    (folder / "config").mkdir()
    host = f"unix://{folder / 'docker.sock'}"
    environment = {**os.environ, "DOCKER_HOST": host, "DOCKER_CONFIG": str(folder / "config")}
    with (folder / "dockerd.log").open("w") as log:
        daemon = subprocess.Popen(
            [
                *("/usr/sbin/dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "pid"), "--host", host, "--storage-driver", "overlay2"),
                *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_it_answers(daemon, folder, environment)
        yield environment
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _wait_until_it_answers(daemon: "subprocess.Popen[bytes]", folder: Path, environment: Mapping[str, str]) -> None:
    deadline_s = time.perf_counter() + _START_DEADLINE_S
    while subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False).returncode != 0:
        if daemon.poll() is not None or time.perf_counter() > deadline_s:
            raise NoEngine(f"The engine did not come up:\n{(folder / 'dockerd.log').read_text()[-2000:]}")
        time.sleep(_POLL_S)


def _unmount_below(folder: Path) -> None:
    """What a stopped engine left mounted, innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((path for path in mounts if path.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", mount], check=False)


def _run(*command: str, environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoEngine(f"{' '.join(command[:4])}: exit status {done.returncode}: {done.stderr.strip()[-500:]}")
