"""The CPU as a device: slots are ordinary memory, copies are memcpy in the transfer thread.

With a link rate it plays a slower link, so that every scheduling path can be seen without a GPU.
"""

import ctypes
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from compute_node.copy_ticket import CopyTicket
from compute_node.device.seam import DeviceMemory, HostCopy, LinkUse
from promoe.errors import InsufficientMemory
from promoe.host_memory import host_memory

SHORTEST_SLEEP_S: Final = 50e-6
"""The kernel wakes a sleeper about this late; shorter waits are carried over to the next chunk."""


class DoneTicket:
    """A copy, or compute, that was finished when it was handed out."""

    def is_done(self) -> bool:
        """Always."""
        return True

    def wait_on_host(self) -> None:
        """Nothing to wait for."""

    def wait_on_compute(self) -> None:
        """Nothing to wait for."""


DONE: Final = DoneTicket()


class NoPinning:
    """Memory needs no pinning to be copied by the CPU."""

    def register(self, address: int, nbytes: int) -> None:
        """Nothing to do."""

    def unregister(self, address: int) -> None:
        """Nothing to do."""

    def drain(self) -> None:
        """Copies are finished when `copy` returns."""


@dataclass
class CpuLink:
    """memcpy, at its own speed or throttled to `bytes_per_s` with the idle times of a real link."""

    bytes_per_s: float | None = None
    _free_at_s: float = 0.0
    _used_nbytes: int = 0
    _used_s: float = 0.0

    @property
    def description(self) -> str:
        """`memcpy`, or `emulated` when throttled."""
        return "memcpy" if self.bytes_per_s is None else "emulated"

    def order_after(self, compute: CopyTicket) -> None:
        """Compute on the CPU is finished before anything else is asked for."""

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        """Copies, then sleeps until the emulated link would have delivered the last byte."""
        started_s = time.perf_counter()
        ctypes.memmove(destination_address, source_address, nbytes)
        if self.bytes_per_s is not None:
            self._free_at_s = max(self._free_at_s, started_s) + nbytes / self.bytes_per_s
            early_s = self._free_at_s - time.perf_counter()
            if early_s > SHORTEST_SLEEP_S:
                time.sleep(early_s)
        self._used_nbytes += nbytes
        self._used_s += time.perf_counter() - started_s
        return DONE

    def take_use(self) -> LinkUse:
        """See `Link.take_use`; an emulated link is busy until its sleeper has woken up."""
        use = LinkUse(self._used_nbytes, self._used_s)
        self._used_nbytes, self._used_s = 0, 0.0
        return use


class CpuDevice:
    """Computes with torch on the CPU; runs everywhere.

    Args:
        link_bytes_per_s: throttles the link; None copies at memory speed.
    """

    kind: Final = "cpu"

    def __init__(self, link_bytes_per_s: float | None = None) -> None:
        self.played_link_bytes_per_s = link_bytes_per_s
        self.torch_device = torch.device("cpu")
        self.name = platform.processor() or platform.machine()
        self.pinning = NoPinning()

    def memory(self) -> DeviceMemory:
        """The host's, or what a container's limit leaves of it."""
        memory = host_memory()
        return DeviceMemory(memory.free_nbytes, memory.total_nbytes)

    def allocate_slots(self, num_slots: int, slot_nbytes: int) -> torch.Tensor:
        """Page-aligned rows, so that tensors of all slots are aligned alike; see `Device.allocate_slots`."""
        nbytes = num_slots * slot_nbytes
        available_nbytes = self.memory().free_nbytes
        if nbytes > available_nbytes:
            raise InsufficientMemory(
                f"{num_slots} expert slots of {slot_nbytes} bytes need {nbytes} bytes, but only {available_nbytes} "
                "bytes of memory are available. Lower --cache-rate or --expert-slots."
            )
        page_nbytes = 4096
        raw_B = torch.empty(nbytes + page_nbytes, dtype=torch.uint8)
        start = -raw_B.data_ptr() % page_nbytes
        return raw_B[start : start + nbytes].view(num_slots, slot_nbytes)

    def open_link(self) -> CpuLink:
        """A link for the transfer thread."""
        return CpuLink(self.played_link_bytes_per_s)

    def index_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """See `Device.index_rows`."""
        return torch.tensor(rows)

    def copy_to_host(self, hidden_TD: torch.Tensor, index_R: torch.Tensor | None) -> HostCopy:
        """A copy from host to host, finished when it is handed out."""
        return HostCopy(hidden_TD.clone() if index_R is None else hidden_TD.index_select(0, index_R), DONE)

    def mark_compute(self) -> CopyTicket:
        """Compute on the CPU is finished when the call that asked for it returns."""
        return DONE

    def wait_begins(self) -> None:
        """The host waits, and is measured where it waits."""

    def take_compute_stall_s(self, host_wait_s: float) -> float:
        """What the host waited."""
        return host_wait_s

    def synchronize(self) -> None:
        """Nothing is ever pending."""
