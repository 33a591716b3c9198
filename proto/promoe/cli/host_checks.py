"""The doctor on the host: memory, locked and shared memory, huge pages, disk."""

import fcntl
import mmap
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from promoe.cli.diagnosis import Finding, fail, ok, warn
from promoe.cli.quantity import format_bytes_per_s, format_nbytes
from promoe.host_memory import host_memory

_LITTLE_MEMORY_NBYTES: Final = 4 << 30
_LITTLE_DISK_NBYTES: Final = 5 << 30
_LITTLE_SHM_NBYTES: Final = 1 << 30
_SLOW_DISK_BYTES_PER_S: Final = 300e6
_PROBE_NBYTES: Final = 64 << 20
_PROBE_BLOCK_NBYTES: Final = 4 << 20
_SHMEM_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def check_memory() -> list[Finding]:
    """RAM, and how much of it may be pinned: the driver counts pinned pages against RAM and the cgroup only."""
    memory = host_memory()
    found = f"{format_nbytes(memory.free_nbytes)} available of {format_nbytes(memory.total_nbytes)}"
    if memory.free_nbytes < _LITTLE_MEMORY_NBYTES:
        ram = warn("memory", found, "all experts of the model must fit in the host's memory: free some")
    else:
        ram = ok("memory", found)
    pinnable = f"up to {format_nbytes(memory.total_nbytes)}"
    if "microsoft" in Path("/proc/version").read_text().lower():
        return [ram, warn("pinned limit", "WSL pins part of the memory only", "raise `memory` in .wslconfig")]
    if memory.has_cgroup_limit:
        return [ram, ok("pinned limit", f"{pinnable}, by the memory limit of this cgroup")]
    return [ram, ok("pinned limit", f"{pinnable}, no cgroup limit")]


def check_memlock() -> Finding:
    """RLIMIT_MEMLOCK. The NVIDIA driver does not count against it; mlock and io_uring do."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "unlimited")
    return ok("memlock", f"{format_nbytes(soft)}; enough, the arena is pinned by the driver and not by mlock")


def check_shared_memory() -> list[Finding]:
    """A sealed memfd can be made (the arena), and /dev/shm has room."""
    try:
        fd = os.memfd_create("promoe-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        finally:
            os.close(fd)
        arena = ok("shared memory", "sealed memfd works")
    except OSError as error:
        arena = fail("shared memory", f"no sealed memfd: {error.strerror}", "allow memfd_create in the seccomp profile")
    try:
        total_nbytes = shutil.disk_usage("/dev/shm").total
    except OSError:
        return [arena, warn("/dev/shm", "missing", "mount a tmpfs on /dev/shm")]
    if total_nbytes < _LITTLE_SHM_NBYTES:
        return [arena, warn("/dev/shm", format_nbytes(total_nbytes), "docker: --shm-size 1g")]
    return [arena, ok("/dev/shm", format_nbytes(total_nbytes))]


def check_huge_pages(has_gpu: bool) -> Finding:
    """Huge pages make registration with the driver several times faster; without a GPU nobody registers."""
    try:
        text = _SHMEM_HUGE_PAGES.read_text()
    except OSError:
        return ok("huge pages", "not offered by this kernel; pages of 4 KiB are used")
    setting = text.partition("[")[2].partition("]")[0]
    if setting in ("never", "deny") and has_gpu:
        mend = f"echo advise | sudo tee {_SHMEM_HUGE_PAGES}"
        return warn("huge pages", f"shared memory has none ({setting}): the arena is registered slower", mend)
    return ok("huge pages", f"for shared memory: {setting}")


def check_disk(folder: Path) -> list[Finding]:
    """Room and O_DIRECT speed of the disk that packs lie on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_nbytes = shutil.disk_usage(folder).free
        written, read = _measure_disk(folder, min(_PROBE_NBYTES, free_nbytes // 4))
    except OSError as error:
        return [fail("disk", f"{folder} cannot be used: {error.strerror}", "give another folder with PROMOE_HOME")]
    room_found = f"{format_nbytes(free_nbytes)} free in {folder}"
    if free_nbytes < _LITTLE_DISK_NBYTES:
        room = warn("disk", room_found, "packs are as large as their models: free some, or set PROMOE_HOME elsewhere")
    else:
        room = ok("disk", room_found)
    if read is None or written is None:
        return [room, warn("disk speed", f"{folder} knows no O_DIRECT", "keep packs on a local disk (PROMOE_HOME)")]
    speed = f"reads {format_bytes_per_s(read)}, writes {format_bytes_per_s(written)} past the page cache"
    if read < _SLOW_DISK_BYTES_PER_S:
        return [room, warn("disk speed", speed, "filling the store takes long: keep packs on an NVMe disk")]
    return [room, ok("disk speed", speed)]


def _measure_disk(folder: Path, nbytes: int) -> tuple[float | None, float | None]:
    """Bytes per second of an O_DIRECT write and read of a small file; None where O_DIRECT is unknown."""
    num_blocks = max(1, nbytes // _PROBE_BLOCK_NBYTES)
    with tempfile.NamedTemporaryFile(dir=folder) as file, mmap.mmap(-1, _PROBE_BLOCK_NBYTES) as block:
        block.write(os.urandom(_PROBE_BLOCK_NBYTES))
        try:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return None, None
        try:
            written_s = _timed(lambda offset: os.pwritev(fd, [block], offset), num_blocks)
            read_s = _timed(lambda offset: os.preadv(fd, [block], offset), num_blocks)
        finally:
            os.close(fd)
    total_nbytes = num_blocks * _PROBE_BLOCK_NBYTES
    return total_nbytes / written_s, total_nbytes / read_s


def _timed(move: Callable[[int], int], num_blocks: int) -> float:
    """Seconds to move all blocks, one after the other."""
    begin_s = time.perf_counter()
    for number in range(num_blocks):
        moved_nbytes = move(number * _PROBE_BLOCK_NBYTES)
        assert moved_nbytes == _PROBE_BLOCK_NBYTES, "a whole block is moved"
    return time.perf_counter() - begin_s
