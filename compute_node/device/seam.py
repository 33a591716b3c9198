"""The seam to an accelerator: memory for slots, copies into them, and how compute waits for a copy.

Two implementations: `cpu.CpuDevice` (real memcpy, runs everywhere) and `cuda.CudaDevice`. Nothing outside this
package names a stream, an event or a CUDA call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from compute_node.copy_ticket import CopyTicket


class HostPinning(Protocol):
    """Makes host memory that another process owns readable by the device's copy engine."""

    def register(self, address: int, nbytes: int) -> None:
        """Pins one page-aligned range; the caller keeps ranges to 64-256 MiB.

        A range that the driver refuses can be copied from all the same, more slowly.
        """

    def unregister(self, address: int) -> None:
        """Undoes `register` of the range that starts at `address`."""

    def drain(self) -> None:
        """Returns when no copy from registered memory is under way."""


@dataclass(frozen=True)
class LinkUse:
    """What a link carried, and for how long it was busy with nothing but that."""

    nbytes: int
    busy_s: float


class Link(Protocol):
    """Copies host memory into device slots; used by the transfer thread only."""

    @property
    def description(self) -> str:
        """`memcpy`, `emulated`, `registered` or `bounce`."""

    def order_after(self, compute: CopyTicket) -> None:
        """Copies started from now on begin after this mark of compute, which may still read what they overwrite."""

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        """Starts copying `nbytes` from host memory to device memory."""

    def take_use(self) -> LinkUse:
        """Of copies that were seen to have ended since the last call; never blocks.

        Waiting for compute (`order_after`), and for a thread to notice an end, is not the link's time.
        """


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A tensor on its way from the device to host memory.

    Attributes:
        tensor: on the host; its values are there when `ticket` is done.
        ticket: of the copy.
    """

    tensor: torch.Tensor
    ticket: CopyTicket

    def wait(self) -> torch.Tensor:
        """The tensor; blocks the calling thread until its values are there, never spins."""
        self.ticket.wait_on_host()
        return self.tensor


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of device memory, as the device reports them."""

    free_nbytes: int
    total_nbytes: int


class Device(Protocol):
    """One compute device."""

    @property
    def torch_device(self) -> torch.device:
        """Where modules and slots live."""

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""

    @property
    def name(self) -> str:
        """For people, for example the GPU's name."""

    @property
    def pinning(self) -> HostPinning:
        """How the arena is made copyable."""

    def memory(self) -> DeviceMemory:
        """Free and total memory right now."""

    def allocate_slots(self, num_slots: int, slot_nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 tensor of shape (num_slots, slot_nbytes).

        Raises:
            InsufficientMemory: the device cannot hold it.
        """

    @property
    def played_link_bytes_per_s(self) -> float | None:
        """The rate of a link that is only played; None where there is a real one."""

    def open_link(self) -> Link:
        """The link of the transfer thread."""

    def index_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Row numbers for `copy_to_host`: int64, on the device. Waits for nothing."""

    def copy_to_host(self, hidden_TD: torch.Tensor, index_R: torch.Tensor | None) -> HostCopy:
        """Starts copying the indexed rows, or all of them, as they are now.

        Compute may overwrite them at once; neither it nor the calling thread waits for the copy.
        """

    def mark_compute(self) -> CopyTicket:
        """A ticket that is done when all compute issued so far has finished (for releasing pins)."""

    def wait_begins(self) -> None:
        """The host has nothing to compute with until the next ticket's `wait_on_compute`."""

    def take_compute_stall_s(self, host_wait_s: float) -> float:
        """Seconds that compute waited for copies since the last call.

        Args:
            host_wait_s: for how long the host waited for them, which is all where compute is done by the host, and
                overlaps with what is still being computed where it is not.
        """

    def synchronize(self) -> None:
        """Blocks until all work on the device has finished."""
