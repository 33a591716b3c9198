"""How much memory this process may still take: the host's, or less where a container's limit is tighter.

The store plans its arena and a node on a CPU its slots by the same number. Reads what Linux tells of itself; both
versions of cgroups, whose limits bind through all parents.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

HOST_LIMIT: Final = "free memory"
CGROUP_LIMIT: Final = "the cgroup's memory limit"

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_NO_LIMIT: Final = 1 << 62
"""Version 1 says a number near 2^63 where there is no limit, version 2 says `max`."""


@dataclass(frozen=True)
class HostMemory:
    """At this moment.

    Attributes:
        free_nbytes: what can still be taken without swapping or being killed; page cache counts as free.
        total_nbytes: the tightest limit, or all of the host's memory.
        limit: what leaves the least free, in words.
        has_cgroup_limit: the host has more than `total_nbytes`.
    """

    free_nbytes: int
    total_nbytes: int
    limit: str
    has_cgroup_limit: bool


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> HostMemory:
    """By the host's own figures and by the limits of this process's cgroup and of its parents."""
    host = dict(_sizes((proc / "meminfo").read_text()))
    rooms = [Room(host["MemAvailable"], host["MemTotal"]), *_cgroup_rooms(proc, cgroups)]
    free_nbytes = min(room.free_nbytes for room in rooms)
    total_nbytes = min(room.total_nbytes for room in rooms)
    limit = HOST_LIMIT if free_nbytes == host["MemAvailable"] else CGROUP_LIMIT
    return HostMemory(max(free_nbytes, 0), total_nbytes, limit, total_nbytes < host["MemTotal"])


class Room(NamedTuple):
    """What one limit leaves, of how much."""

    free_nbytes: int
    total_nbytes: int


class _Version(NamedTuple):
    """Names of one version's files, and of the page cache in its statistics, which count children, too."""

    limit: str
    usage: str
    cached: tuple[str, str]


_V1: Final = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = _Version("memory.max", "memory.current", ("inactive_file", "active_file"))


def room_in(group: Path) -> Room | None:
    """What the limit of one cgroup leaves; None where it has none."""
    version = _V2 if (group / _V2.limit).is_file() else _V1
    try:
        limit = (group / version.limit).read_text().strip()
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        used_nbytes = int((group / version.usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    cached_nbytes = sum(int(statistics.get(name, 0)) for name in version.cached)
    return Room(int(limit) - used_nbytes + cached_nbytes, int(limit))


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[Room]:
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = cgroups
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
        else:
            continue
        # A container may see its path on the host and yet have its own group mounted at the root: what is not there
        # has no limit, and the root is asked as the last.
        group = root / path.lstrip("/")
        while group.is_relative_to(root):
            room = room_in(group)
            if room is not None:
                yield room
            group = group.parent


def _sizes(meminfo: str) -> Iterator[tuple[str, int]]:
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            yield name, int(rest.split()[0]) << 10
