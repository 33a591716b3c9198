"""The doctor: this host is well enough to run the tests, and each ailment has its mend."""

import importlib.metadata
import json
import mmap
import resource
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from promoe.cli import host_checks, software_checks
from promoe.cli.app import main
from promoe.cli.diagnosis import Finding, Verdict
from promoe.cli.doctor import DoctorFlags, examine
from promoe.cli.gpu_checks import check_gpu
from promoe.cli.host_checks import check_disk, check_huge_pages, check_memlock, check_memory, check_shared_memory
from promoe.cli.run_dir import RunDir, StackState
from promoe.cli.software_checks import check_packages, check_port, check_python, check_run_dir
from promoe.host_memory import CGROUP_LIMIT, HostMemory


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield Path(path)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_everything_that_is_not_ok_has_a_mend(folder: Path) -> None:
    findings = examine(DoctorFlags(run_dir=folder / "run", listen="127.0.0.1:0", disk=folder))
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "transformers", "gpu driver", "memlock", "/dev/shm", "huge pages"} <= set(names)
    assert {"memory", "pinned limit", "shared memory", "disk", "disk speed", "run folder", "endpoint"} <= set(names)
    for finding in findings:
        assert finding.found
        assert bool(finding.mend) == (finding.verdict is not Verdict.OK), finding


def run_doctor(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["promoe", "doctor", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_exit_code_says_whether_anything_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--disk", str(folder), "--listen", "127.0.0.1:0"]
    assert run_doctor([*flags, "--run-dir", str(folder / "run"), "--json"], monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    assert {entry["verdict"] for entry in document} <= {"ok", "warn"}
    assert run_doctor([*flags, "--run-dir", str(folder / ("x" * 100))], monkeypatch) == 1
    shown = capsys.readouterr().out
    assert "fail  run folder" in shown
    assert "→ give another --run-dir" in shown


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_python().verdict is Verdict.OK
    monkeypatch.setattr(software_checks, "_OLDEST_PYTHON", (99, 0))
    assert (check_python().verdict, check_python().mend) == (Verdict.FAIL, "use Python 99.0 or newer")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("2.11.0", Verdict.OK), ("2.13.0+cpu", Verdict.OK), ("2.9.1", Verdict.FAIL), ("2.10.0rc1", Verdict.FAIL)],
)
def test_versions_are_compared_as_numbers(found: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: ["torch>=2.11", 'pytest>=9; extra == "dev"'])
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: found)
    (finding,) = check_packages()
    assert finding.verdict is verdict
    if verdict is Verdict.FAIL:
        assert finding.mend == "pip install 'torch>=2.11'"


def test_an_upper_bound_and_a_missing_package_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: ["transformers<6,>=5.17"])
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "6.0")
    assert check_packages()[0].found == "6.0, but <6,>=5.17 is needed"

    def raise_missing(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", raise_missing)
    assert (check_packages()[0].verdict, check_packages()[0].found) == (Verdict.FAIL, "not installed")


def test_the_installed_packages_are_those_the_distribution_wants() -> None:
    found = by_name(check_packages())
    assert set(found) == {"torch", "transformers", "grpcio", "protobuf", "safetensors"}
    assert all(finding.verdict is Verdict.OK for finding in found.values())


def test_the_run_folder_is_tried(folder: Path) -> None:
    run_dir = RunDir(folder / "run")
    assert check_run_dir(run_dir).verdict is Verdict.OK
    assert [path.name for path in run_dir.path.iterdir()] == ["stack.lock"]
    with run_dir.hold():
        run_dir.write_state(StackState(7, "ready", "127.0.0.1:5", "s", "m", "p", 0.0))
        assert "a stack is running in it (process 7)" in check_run_dir(run_dir).found
        assert "served by the stack" in check_port("127.0.0.1:5", run_dir).found


def test_ports(folder: Path) -> None:
    run_dir = RunDir(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = check_port(f"127.0.0.1:{server.getsockname()[1]}", run_dir)
    assert taken.verdict is Verdict.WARN
    assert check_port("nonsense", run_dir).verdict is Verdict.FAIL


def test_disks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(check_disk(folder))
    assert "free in" in found["disk"].found
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(host_checks, "_SLOW_DISK_BYTES_PER_S", 1e15)
    monkeypatch.setattr(host_checks, "_LITTLE_DISK_NBYTES", 1 << 60)
    slow = by_name(check_disk(folder))
    assert (slow["disk"].verdict, slow["disk speed"].verdict) == (Verdict.WARN, Verdict.WARN)
    (folder / "file").write_text("")
    (broken,) = check_disk(folder / "file" / "folder")
    assert (broken.verdict, broken.mend) == (Verdict.FAIL, "give another folder with PROMOE_HOME")


def test_memory_and_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.name for finding in check_memory()] == ["memory", "pinned limit"]
    monkeypatch.setattr(host_checks, "_LITTLE_MEMORY_NBYTES", 1 << 60)
    bound = HostMemory(0, mmap.PAGESIZE, CGROUP_LIMIT, has_cgroup_limit=True)
    monkeypatch.setattr(host_checks, "host_memory", lambda: bound)
    little, pinned = check_memory()
    assert little.verdict is Verdict.WARN
    assert pinned.found == "up to 4.00 KiB, by the memory limit of this cgroup"
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert check_memlock().found == "unlimited"


def test_shared_memory_and_huge_pages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_shared_memory()[0].found == "sealed memfd works"
    monkeypatch.setattr(host_checks, "_LITTLE_SHM_NBYTES", 1 << 60)
    assert check_shared_memory()[1].verdict is Verdict.WARN
    monkeypatch.setattr(host_checks, "_SHMEM_HUGE_PAGES", folder / "shmem_enabled")
    assert "not offered" in check_huge_pages(True).found
    (folder / "shmem_enabled").write_text("always within_size advise [never] deny force\n")
    assert check_huge_pages(False).verdict is Verdict.OK
    assert check_huge_pages(True).mend.startswith("echo advise | sudo tee")
    (folder / "shmem_enabled").write_text("always within_size [advise] never deny force\n")
    assert check_huge_pages(True).found == "for shared memory: advise"


def test_no_gpu_is_fine_and_a_gpu_is_named() -> None:
    findings = by_name(check_gpu())
    driver = findings["gpu driver"]
    assert ("models run on the CPU" in driver.found) == ("gpu" not in findings)
    assert driver.verdict in (Verdict.OK, Verdict.WARN)
