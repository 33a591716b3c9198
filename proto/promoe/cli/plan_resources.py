"""What a stack needs of device and host, what is there, and what mends what is short: one line each."""

import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from promoe.cli.diagnosis import Verdict
from promoe.cli.host_checks import check_shared_memory
from promoe.cli.plan_inquiry import StoreAnswer
from promoe.cli.quantity import format_nbytes
from promoe.model_spec import Dtype

_SHM_FOLDER: Final = Path("/dev/shm")


@dataclass(frozen=True)
class Resource:
    """One line of the plan.

    Attributes:
        name: what.
        need_nbytes: None where nothing is needed.
        have_nbytes: what is there for it; None where nothing limits it.
        verdict: `ok` or `fail`.
        note: a few words.
        mend: what makes it fit; empty where it fits.
    """

    name: str
    need_nbytes: int | None
    have_nbytes: int | None
    verdict: Verdict
    note: str
    mend: str = ""

    @property
    def sentence(self) -> str:
        """What is short, by how much, and the mend; empty where it fits."""
        if self.verdict is Verdict.OK:
            return ""
        if self.need_nbytes is None or self.have_nbytes is None:
            return f"{self.name.capitalize()}: {self.note}. {self.mend}"
        short = format_nbytes(self.need_nbytes - self.have_nbytes)
        return (
            f"{self.name.capitalize()}: {format_nbytes(self.need_nbytes)} needed, {format_nbytes(self.have_nbytes)} "
            f"there, {short} short. {self.mend}"
        ).rstrip()


def device_resources(plan: Mapping[str, object]) -> Iterator[Resource]:
    """The parts of a node's plan, which names what is short; `plan` is `compute_node.planning`'s document."""
    parts, mends = plan["parts"], plan["mends"]
    assert isinstance(parts, list), "a node's plan has parts"
    assert isinstance(mends, list), "a node's plan has mends"
    mend = f"Give {', or '.join(mends)}." if mends else "No flag mends it: it takes a larger device."
    for part in parts:
        yield _sized(part["name"], part["need_nbytes"], part["have_nbytes"], part["detail"], mend)
        if part["short_nbytes"]:
            mend = ""  # said once


def host_resources(store: StoreAnswer, host_nbytes: int | None, pack_dir: Path) -> Iterator[Resource]:
    """Arena, disk and the two limits that people raise in vain.

    Args:
        store: what the expert store answered.
        host_nbytes: free memory of a host that is not this one; None: of this one.
        pack_dir: where the pack is or will be.
    """
    yield _arena(store, host_nbytes)
    yield from _disk(store, pack_dir)
    yield _memlock()
    yield _shared_memory()


def _arena(store: StoreAnswer, host_nbytes: int | None) -> Resource:
    footprint, room = store.footprint, store.room
    mend = "Free memory, or raise the limit (docker: mem_limit); --host-memory plans for another host."
    if footprint.spec.layout.dtype is Dtype.FLOAT32:
        mend = f"--dtype bfloat16 halves it. {mend}"
    have_nbytes, limit = (room.nbytes, room.limit) if host_nbytes is None else (host_nbytes, "as given")
    need_nbytes = footprint.arena_nbytes + room.reserve_nbytes
    return _sized("host arena", need_nbytes, have_nbytes, f"all experts; {limit}", mend)


def _disk(store: StoreAnswer, pack_dir: Path) -> Iterator[Resource]:
    footprint = store.footprint
    folder = _existing(pack_dir)
    free_nbytes = psutil.disk_usage(str(folder)).free
    if footprint.is_packed:
        note = f"packed already: {format_nbytes(footprint.pack_nbytes)}"
        yield Resource("pack on disk", 0, free_nbytes, Verdict.OK, note)
        return
    mend = "Make room, or set PROMOE_HOME to a folder on another disk."
    source_folder = _existing(Path(footprint.source_folder)) if footprint.source_folder else folder
    need_nbytes, note = footprint.pack_nbytes, "made on first use"
    if footprint.source_nbytes and source_folder.stat().st_dev == folder.stat().st_dev:
        need_nbytes += footprint.source_nbytes
        note = f"and {format_nbytes(footprint.source_nbytes)} of checkpoint before it"
    elif footprint.source_nbytes:
        source_free_nbytes = psutil.disk_usage(str(source_folder)).free
        other = "Make room, or set HF_HOME to a folder on another disk."
        yield _sized("download", footprint.source_nbytes, source_free_nbytes, "the hub's local cache", other)
    yield _sized("pack on disk", need_nbytes, free_nbytes, note, mend)


def _memlock() -> Resource:
    """The driver pins the arena without counting it against this limit, so that it never is what is short."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    have_nbytes = None if soft == resource.RLIM_INFINITY else soft
    return Resource("memlock", None, have_nbytes, Verdict.OK, "not used: the driver pins, not mlock")


def _shared_memory() -> Resource:
    """The arena is a memfd: bounded by memory, not by what is mounted on /dev/shm."""
    memfd = check_shared_memory()[0]
    have_nbytes = psutil.disk_usage(str(_SHM_FOLDER)).total if _SHM_FOLDER.is_dir() else None
    if memfd.verdict is not Verdict.OK:
        return Resource("shared memory", None, have_nbytes, Verdict.FAIL, memfd.found, f"{memfd.mend.capitalize()}.")
    return Resource("/dev/shm", None, have_nbytes, Verdict.OK, "not used: the arena is a sealed memfd")


def _sized(name: str, need_nbytes: int, have_nbytes: int, note: str, mend: str) -> Resource:
    if need_nbytes <= have_nbytes:
        return Resource(name, need_nbytes, have_nbytes, Verdict.OK, note)
    return Resource(name, need_nbytes, have_nbytes, Verdict.FAIL, note, mend)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
