"""Free memory is the host's or a container's, whichever is less: by both versions of cgroups, through all parents."""

from pathlib import Path
from typing import Final

import psutil
import pytest

from promoe.host_memory import CGROUP_LIMIT, HOST_LIMIT, HostMemory, host_memory

GIB: Final = 1 << 30
MEMINFO: Final = f"MemTotal: {16 << 20} kB\nMemFree: 5 kB\nMemAvailable: {12 << 20} kB\nHugePages_Total: 0\n"
V2: Final = ("memory.max", "memory.current", "inactive_file")
V1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V1_NO_LIMIT: Final = str((1 << 63) - 4096)


class Host:
    """What Linux tells, in a folder."""

    def __init__(self, folder: Path, groups: str) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(MEMINFO)
        (self.proc / "self/cgroup").write_text(groups)

    def write_group(self, path: str, names: tuple[str, str, str], limit: str, used: int = 0, cached: int = 0) -> None:
        group = self.cgroups / path
        group.mkdir(parents=True, exist_ok=True)
        limit_name, usage_name, cached_name = names
        (group / limit_name).write_text(f"{limit}\n")
        (group / usage_name).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\nfile 7\n{cached_name} {cached}\n")

    def memory(self) -> HostMemory:
        return host_memory(self.proc, self.cgroups)


def test_without_a_limit_it_is_the_hosts(tmp_path: Path) -> None:
    host = Host(tmp_path, "9:name=systemd:/\n4:memory:/a\n0::/a\n")
    host.write_group("a", V2, "max")
    host.write_group("memory/a", V1, V1_NO_LIMIT, used=7 * GIB)
    assert host.memory() == HostMemory(12 * GIB, 16 * GIB, HOST_LIMIT, has_cgroup_limit=False)


@pytest.mark.parametrize(
    ("groups", "folder", "names"),
    [
        ("0::/pod/container\n", "pod/container", V2),
        ("0::/pod/container\n", "pod", V2),
        ("0::/\n", "", V2),
        ("4:cpu,memory:/pod/container\n0::/\n", "memory/pod", V1),
        # The path is the host's, the group is mounted at the root: a container without a namespace of cgroups.
        ("4:memory:/docker/0123\n", "memory", V1),
    ],
)
def test_the_tightest_limit_counts_less_what_is_used_but_for_the_page_cache(
    tmp_path: Path, groups: str, folder: str, names: tuple[str, str, str]
) -> None:
    host = Host(tmp_path, groups)
    host.write_group(folder, names, str(4 * GIB), used=3 * GIB, cached=GIB)
    assert host.memory() == HostMemory(2 * GIB, 4 * GIB, CGROUP_LIMIT, has_cgroup_limit=True)


def test_a_wide_limit_binds_only_when_it_is_used_up(tmp_path: Path) -> None:
    host = Host(tmp_path, "0::/a\n")
    host.write_group("a", V2, str(15 * GIB), used=GIB)
    assert host.memory() == HostMemory(12 * GIB, 15 * GIB, HOST_LIMIT, has_cgroup_limit=True)
    host.write_group("a", V2, str(15 * GIB), used=16 * GIB)
    assert host.memory() == HostMemory(0, 15 * GIB, CGROUP_LIMIT, has_cgroup_limit=True)


def test_this_hosts_figures_can_be_read() -> None:
    memory = host_memory()
    assert 0 < memory.free_nbytes <= memory.total_nbytes <= psutil.virtual_memory().total
