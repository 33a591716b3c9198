"""The doctor on software: Python, packages, the run folder's sockets, the port."""

import importlib.metadata
import os
import platform
import re
import socket
import sys
from typing import Final

from promoe.cli.diagnosis import Finding, fail, ok, warn
from promoe.cli.run_dir import RunDir
from promoe.cli.stack_plan import check_port_free
from promoe.errors import AlreadyRunning, PromoeError

_OLDEST_PYTHON: Final = (3, 11)


def check_python() -> Finding:
    """The interpreter's version."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] < _OLDEST_PYTHON:
        return fail("python", found, f"use Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer")
    return ok("python", found)


def check_packages() -> list[Finding]:
    """Versions of what the distribution says it needs, as installed, without importing any of it."""
    return [
        _check_package(name, wanted)
        for name, wanted in _requirements()
        if name in ("torch", "transformers", "grpcio", "protobuf", "safetensors")
    ]


def _requirements() -> list[tuple[str, str]]:
    requirements = []
    for line in importlib.metadata.requires("promoe") or ():
        if "extra ==" in line:
            continue
        match = re.match(r"([\w.-]+)\s*([^;]*)", line)
        assert match is not None, f"{line!r} is a requirement"
        requirements.append((match[1], match[2].strip()))
    return requirements


def _check_package(name: str, wanted: str) -> Finding:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return fail(name, "not installed", f"pip install '{name}{wanted}'")
    if not _satisfies(found, wanted):
        return fail(name, f"{found}, but {wanted} is needed", f"pip install '{name}{wanted}'")
    return ok(name, found)


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a release satisfies `>=` and `<` clauses, the only ones that the distribution uses."""
    for clause in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", clause)
        assert match is not None, f"{clause!r} is a clause"
        is_at_least = _release(version) >= _release(match[2])
        if is_at_least != (match[1] == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    assert numbers is not None, f"{version!r} is a version"
    release = [int(number) for number in numbers[0].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def check_run_dir(run_dir: RunDir) -> Finding:
    """A stack's sockets can be made in the run folder."""
    state = run_dir.read_state()
    if state is not None:
        return ok("run folder", f"{run_dir.path}, a stack is running in it (process {state.pid})")
    try:
        with run_dir.hold(), socket.socket(socket.AF_UNIX) as probe:
            path = run_dir.path / f"doctor-{os.getpid()}.sock"
            probe.bind(str(path))
            path.unlink()
    except PromoeError as error:
        return fail("run folder", str(error), "give another --run-dir")
    except OSError as error:
        return fail(
            "run folder",
            f"no unix socket can be made in {run_dir.path}: {error.strerror}",
            "give a --run-dir on a local disk",
        )
    return ok("run folder", f"{run_dir.path} takes sockets")


def check_port(listen: str, run_dir: RunDir) -> Finding:
    """The address that `promoe up` would serve on is free, or ours."""
    state = run_dir.read_state()
    if state is not None and state.endpoint == listen:
        return ok("endpoint", f"{listen} is served by the stack that is running")
    try:
        check_port_free(listen)
    except AlreadyRunning as error:
        return warn("endpoint", str(error), "stop what listens there, or give `promoe up` another --listen")
    except PromoeError as error:
        return fail("endpoint", str(error), "give another --listen")
    return ok("endpoint", f"{listen} is free")
