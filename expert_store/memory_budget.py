"""How much memory this process may still take for an arena."""

from pathlib import Path
from typing import Final

from promoe.errors import InsufficientMemory
from promoe.footprint import HostRoom

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

# What the store's own process and the kernel's tables need beside the arena.
_RESERVE_NBYTES: Final = 128 << 20


def check_room_for(arena_nbytes: int) -> None:
    """Raises InsufficientMemory naming the number that is short."""
    room = host_room()
    wanted = arena_nbytes + room.reserve_nbytes
    if wanted > room.nbytes:
        raise InsufficientMemory(
            f"The arena needs {_gib(wanted)} GiB, but {room.limit} leaves {_gib(room.nbytes)} GiB: "
            f"{_gib(wanted - room.nbytes)} GiB are short. Free memory or raise the limit (docker: mem_limit)."
        )


def host_room() -> HostRoom:
    """What the tightest limit leaves at this moment."""
    rooms = [(_free_nbytes(), "free memory"), *((room, "the cgroup's memory limit") for room in _cgroup_rooms())]
    available, limit = min(rooms)
    return HostRoom(max(available, 0), limit, _RESERVE_NBYTES)


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f}"


def _free_nbytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise AssertionError("/proc/meminfo has MemAvailable since Linux 3.14")


def _cgroup_rooms() -> list[int]:
    """What each limit of this process's cgroup and its parents leaves; page cache counts as free."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    relative = next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), None)
    if relative is None:
        return []
    group = _CGROUP_ROOT / relative
    rooms = []
    while group.is_relative_to(_CGROUP_ROOT):
        room = room_in(group)
        if room is not None:
            rooms.append(room)
        group = group.parent
    return rooms


def room_in(group: Path) -> int | None:
    """Bytes that a cgroup's memory limit leaves; None for no limit. Page cache counts as free."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    reclaimable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return int(limit) - used + reclaimable
