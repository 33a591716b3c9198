"""One CUDA GPU: registered arena, a copy stream, events; the host never spins.

The arena is registered with the driver. Where the driver refuses, copies go through a small pinned bounce ring.
Source: torch.cuda streams and events.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

import torch

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cuda_driver import CudaDriver, RegisteredRanges
from compute_node.device.seam import DeviceMemory, HostCopy, LinkUse
from promoe.errors import InsufficientMemory, Unavailable

logger = logging.getLogger(__name__)

BOUNCE_BUFFERS: Final = 4
BOUNCE_NBYTES: Final = 8 << 20
FEW_NBYTES: Final = 64 << 10
"""Copies to the host of so little pass between two kernels: a stream of their own costs more than it saves."""


class StallMeter:
    """Adds up how long the compute stream had nothing to do but to wait for copies, from pairs of timing events.

    A wait begins on the stream when the host has found nothing to compute with (`begin`), and ends when the stream has
    passed the copy's event: what the stream still computes while the host waits is no stall.
    """

    def __init__(self) -> None:
        self._begun: torch.cuda.Event | None = None
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        """Whatever the current stream still has to do ends here; a wait that was never ended is forgotten."""
        self._begun = self._mark()

    def end(self, copied: torch.cuda.Event) -> None:
        """Orders the current stream behind `copied`; remembers how long that took, if it takes anything."""
        begun, self._begun = self._begun, None
        is_copied = copied.query()
        if is_copied and begun is None:
            return
        begun = begun or self._mark()
        if not is_copied:
            torch.cuda.current_stream().wait_event(copied)
        self._open.append((begun, self._mark()))

    def take_s(self) -> float:
        """Seconds of the waits that are over and were not taken yet; never blocks."""
        total_ms = 0.0
        while self._open and self._open[0][1].query():
            begun, ended = self._open.popleft()
            total_ms += begun.elapsed_time(ended)
        return total_ms / 1e3

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream())
        return event


class EventTicket:
    """What a recorded event stands for."""

    def __init__(self, event: torch.cuda.Event, stalls: StallMeter) -> None:
        self.event = event
        self._stalls = stalls

    def is_done(self) -> bool:
        """True once the stream has passed the event."""
        return bool(self.event.query())

    def wait_on_host(self) -> None:
        """Sleeps (the event is a blocking one) until the stream has passed the event."""
        self.event.synchronize()

    def wait_on_compute(self) -> None:
        """Orders the current stream behind the event; the host does not wait."""
        self._stalls.end(self.event)


class CudaPinning:
    """Registers the arena's chunks in this process; each compute node does so for itself.

    Attributes:
        ranges: what the copy engine may read at the link's full rate; anything else goes through the bounce ring.
        refused: the driver refused a chunk, so that no further one is tried.
    """

    def __init__(self, driver: CudaDriver, device_index: int) -> None:
        self._driver = driver
        self._device_index = device_index
        self.ranges = RegisteredRanges()
        self.refused = False

    def register(self, address: int, nbytes: int) -> None:
        """Pins one chunk, or remembers that the driver refuses; what is registered already stays so."""
        if self.refused:
            return
        self._driver.enter_thread()
        try:
            self._driver.register(address, nbytes)
        except Unavailable as error:
            logger.warning(
                "%d bytes of the arena cannot be registered (%s); copies of what is not go through a pinned ring at "
                "about half the link's rate.",
                nbytes,
                error,
            )
            self.refused = True
            return
        self.ranges.add(address, nbytes)

    def unregister(self, address: int) -> None:
        """Undoes `register`; ranges that were never registered are none of the driver's business."""
        if self.ranges.remove(address):
            self._driver.enter_thread()
            self._driver.unregister(address)

    def drain(self) -> None:
        """No copy is under way after this."""
        torch.cuda.synchronize(self._device_index)


class CudaLink:
    """Host to device on one copy stream; used by the transfer thread only."""

    def __init__(self, device_index: int, driver: CudaDriver, pinning: CudaPinning, stalls: StallMeter) -> None:
        torch.cuda.set_device(device_index)
        driver.enter_thread()
        self._driver = driver
        self._stream = torch.cuda.Stream(device_index)
        self._stalls = stalls
        self._pinning = pinning
        self._bounce: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    @property
    def description(self) -> str:
        """`registered`, or `bounce` when the driver refused (a part of) the arena."""
        return "bounce" if self._pinning.refused else "registered"

    def order_after(self, compute: CopyTicket) -> None:
        """The copy stream waits for the mark; the host does not."""
        self._stream.wait_event(cast(EventTicket, compute).event)

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        """Queues the copy and an event behind it."""
        if not self._pinning.ranges.covers(source_address, nbytes):
            return self._copy_through_ring(destination_address, source_address, nbytes)
        return EventTicket(self._start(destination_address, source_address, nbytes), self._stalls)

    def take_use(self) -> LinkUse:
        """From the copy stream's own clock."""
        nbytes, busy_ms = 0, 0.0
        while self._under_way and self._under_way[0][1].query():
            begun, ended, copied_nbytes = self._under_way.popleft()
            nbytes += copied_nbytes
            busy_ms += begun.elapsed_time(ended)
        return LinkUse(nbytes, busy_ms / 1e3)

    def _start(self, destination_address: int, source_address: int, nbytes: int) -> torch.cuda.Event:
        # Behind what the stream was told to wait for, which is not the link's time.
        begun = torch.cuda.Event(enable_timing=True)
        begun.record(self._stream)
        self._driver.copy_to_device(destination_address, source_address, nbytes, self._stream.cuda_stream)
        # A blocking event: a host thread that waits for it sleeps.
        ended = torch.cuda.Event(enable_timing=True, blocking=True)
        ended.record(self._stream)
        self._under_way.append((begun, ended, nbytes))
        return ended

    def _copy_through_ring(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        done_nbytes = 0
        event: torch.cuda.Event | None = None
        while done_nbytes < nbytes:
            part_nbytes = min(BOUNCE_NBYTES, nbytes - done_nbytes)
            buffer_B = self._free_bounce_buffer()
            ctypes.memmove(buffer_B.data_ptr(), source_address + done_nbytes, part_nbytes)
            event = self._start(destination_address + done_nbytes, buffer_B.data_ptr(), part_nbytes)
            self._bounce.append((buffer_B, event))
            done_nbytes += part_nbytes
        assert event is not None, "a copy has at least one byte"
        return EventTicket(event, self._stalls)

    def _free_bounce_buffer(self) -> torch.Tensor:
        if len(self._bounce) < BOUNCE_BUFFERS:
            return torch.empty(BOUNCE_NBYTES, dtype=torch.uint8, pin_memory=True)
        buffer_B, event = self._bounce.popleft()
        event.synchronize()
        return buffer_B


class CudaDevice:
    """One GPU. Raises Unavailable when it cannot be used."""

    kind: Final = "cuda"
    played_link_bytes_per_s: Final = None

    def __init__(self, device_index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("No CUDA device can be used: torch.cuda.is_available() is false. Use --device cpu.")
        torch.cuda.set_device(device_index)
        self._device_index = device_index
        self._stalls = StallMeter()
        self.torch_device = torch.device("cuda", device_index)
        self.name = torch.cuda.get_device_name(device_index)
        self._driver = CudaDriver(device_index)
        self.pinning = CudaPinning(self._driver, device_index)
        # Beside the compute stream, which must not wait for a copy that is nobody's but a predictor's.
        self._to_host = torch.cuda.Stream(device_index)

    def memory(self) -> DeviceMemory:
        """As the driver reports it, plus what torch's allocator holds unused."""
        free_nbytes, total_nbytes = torch.cuda.mem_get_info(self._device_index)
        unused = torch.cuda.memory_reserved(self._device_index) - torch.cuda.memory_allocated(self._device_index)
        return DeviceMemory(free_nbytes + unused, total_nbytes)

    def allocate_slots(self, num_slots: int, slot_nbytes: int) -> torch.Tensor:
        """See `Device.allocate_slots`."""
        try:
            return torch.empty(num_slots, slot_nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError:
            free_nbytes = self.memory().free_nbytes
            raise InsufficientMemory(
                f"{num_slots} expert slots of {slot_nbytes} bytes need {num_slots * slot_nbytes} bytes, but only "
                f"{free_nbytes} bytes of GPU memory are free. Lower --cache-rate or --expert-slots."
            ) from None

    def open_link(self) -> CudaLink:
        """A link with a copy stream of its own."""
        return CudaLink(self._device_index, self._driver, self.pinning, self._stalls)

    def index_rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Through pinned memory: a copy from pageable memory would wait for the stream."""
        return torch.tensor(rows, pin_memory=True).to(self.torch_device, non_blocking=True)

    def copy_to_host(self, hidden_TD: torch.Tensor, index_R: torch.Tensor | None) -> HostCopy:
        """Gathered on the compute stream, copied to pinned memory on a stream of its own unless it is very little.

        torch's allocators keep both buffers until the copy has passed, whoever lets go of them before.
        """
        if index_R is None and hidden_TD.nbytes <= FEW_NBYTES:
            host_TD = torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, pin_memory=True)
            host_TD.copy_(hidden_TD, non_blocking=True)
            return HostCopy(host_TD, self.mark_compute())
        rows_RD = hidden_TD.clone() if index_R is None else hidden_TD.index_select(0, index_R)
        gathered = torch.cuda.Event()
        gathered.record(torch.cuda.current_stream())
        host_RD = torch.empty(rows_RD.shape, dtype=rows_RD.dtype, pin_memory=True)
        with torch.cuda.stream(self._to_host):
            self._to_host.wait_event(gathered)
            host_RD.copy_(rows_RD, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._to_host)
        rows_RD.record_stream(self._to_host)
        return HostCopy(host_RD, EventTicket(copied, self._stalls))

    def mark_compute(self) -> CopyTicket:
        """An event on the stream that computes."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream())
        return EventTicket(event, self._stalls)

    def wait_begins(self) -> None:
        """A timing event on the stream that computes."""
        self._stalls.begin()

    def take_compute_stall_s(self, host_wait_s: float) -> float:
        """From timing events; waits still open are taken next time."""
        return self._stalls.take_s()

    def synchronize(self) -> None:
        """Waits for every stream of the device."""
        torch.cuda.synchronize(self._device_index)
