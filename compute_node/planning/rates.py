"""How fast the link and the device's memory are: as given, as measured here, or, for a machine elsewhere, assumed."""

import ctypes
import time
from dataclasses import dataclass
from typing import Final

import torch

from compute_node.planning.planned_device import PlannedDevice

ASSUMED_LINK_BYTES_PER_S: Final = 25e9
"""A pinned copy over PCIe 4.0 x16."""

ASSUMED_MEMORY_BYTES_PER_S: Final = 900e9
"""A desktop GPU of the larger kind: GDDR6X on 384 bits, less a tenth."""

_PROBE_NBYTES: Final = 64 << 20
_REPEATS: Final = 3


@dataclass(frozen=True)
class Rate:
    """Bytes per second, and where the number comes from."""

    bytes_per_s: float
    source: str


def link_rate(planned: PlannedDevice, given: float | None, played: float | None) -> Rate:
    """From the host's memory into device slots."""
    if given is not None:
        return Rate(given, "given")
    if played is not None:
        return Rate(played, "compute.link_bytes_per_s")
    if planned.device is None:
        return Rate(ASSUMED_LINK_BYTES_PER_S, "assumed: PCIe 4.0 x16; --link says another")
    if planned.kind == "cuda":
        return Rate(_copy_rate(pinned=True), "measured: a pinned copy")
    return Rate(_memmove_rate(), "measured: memory to memory, one thread")


def memory_rate(planned: PlannedDevice, given: float | None) -> Rate:
    """At which compute reads weights."""
    if given is not None:
        return Rate(given, "given")
    if planned.device is None:
        return Rate(ASSUMED_MEMORY_BYTES_PER_S, "assumed: a large desktop GPU; --memory-bandwidth says another")
    # A copy reads and writes.
    return Rate(2 * _copy_rate(pinned=False, kind=planned.kind), "measured: a copy on the device")


def _copy_rate(*, pinned: bool, kind: str = "cuda") -> float:
    source_kind = "cpu" if pinned else kind
    source_B = torch.ones(_PROBE_NBYTES, dtype=torch.uint8, device=source_kind, pin_memory=pinned)
    target_B = torch.zeros(_PROBE_NBYTES, dtype=torch.uint8, device=kind)
    best_s = float("inf")
    for _ in range(_REPEATS):
        begin_s = _synchronised_s(kind)
        target_B.copy_(source_B, non_blocking=True)
        best_s = min(best_s, _synchronised_s(kind) - begin_s)
    return _PROBE_NBYTES / best_s


def _memmove_rate() -> float:
    source, target = (ctypes.create_string_buffer(_PROBE_NBYTES) for _ in range(2))
    best_s = float("inf")
    for _ in range(_REPEATS):
        begin_s = time.perf_counter()
        ctypes.memmove(target, source, _PROBE_NBYTES)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return _PROBE_NBYTES / best_s


def _synchronised_s(kind: str) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
