"""A device whose two streams run behind the host, as a GPU's do: work is queued, and done some time later.

The compute stream and the copy stream each do their own work in order; which of them goes on, and when, is drawn from
a seed whenever anybody looks. So whatever is not ordered by a ticket happens in the wrong order sooner or later.
"""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import cast

import torch

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cpu import CpuDevice, NoPinning
from compute_node.device.seam import DeviceMemory, HostCopy, LinkUse

NBYTES_PER_S = 1e9


class LazyTicket:
    """A place in a stream."""

    def __init__(self, streams: "LazyStreams") -> None:
        self._streams = streams
        self.is_passed = False

    def is_done(self) -> bool:
        self._streams.let_pass()
        return self.is_passed

    def wait_on_host(self) -> None:
        self._streams.run_until(lambda: self.is_passed)

    def wait_on_compute(self) -> None:
        self._streams.compute.append(self)


Work = LazyTicket | Callable[[], None]
"""Either waits until a ticket of the other stream is passed, or does something."""


class LazyStreams:
    """Work that was queued and not done."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._lock = threading.RLock()
        self.compute: deque[Work] = deque()
        self.copy: deque[Work] = deque()

    def ticket(self, stream: deque[Work]) -> LazyTicket:
        """Passed when the stream has done all its work so far."""
        ticket = LazyTicket(self)

        def pass_it() -> None:
            ticket.is_passed = True

        stream.append(pass_it)
        return ticket

    def let_pass(self) -> None:
        """A little of the work, or none."""
        with self._lock:
            for _ in range(self._random.randrange(3)):
                self._do_one()

    def run_until(self, is_enough: Callable[[], bool]) -> None:
        """As much work as it takes; other threads go on meanwhile."""
        while True:
            with self._lock:
                if is_enough():
                    return
                assert self._do_one(), "the streams wait for each other"
            time.sleep(0)

    def drain(self) -> None:
        """All work."""
        self.run_until(lambda: not self.compute and not self.copy)

    def _do_one(self) -> bool:
        streams = [self.compute, self.copy]
        self._random.shuffle(streams)
        for stream in streams:
            if not stream:
                continue
            work = stream[0]
            if isinstance(work, LazyTicket):
                if not work.is_passed:
                    continue
            else:
                work()
            stream.popleft()
            return True
        return False


class LazyLink:
    """The copy stream."""

    description = "lazy"

    def __init__(self, streams: LazyStreams) -> None:
        self._streams = streams
        self._used: deque[int] = deque()

    def order_after(self, compute: CopyTicket) -> None:
        self._streams.copy.append(cast(LazyTicket, compute))

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        def move() -> None:
            ctypes.memmove(destination_address, source_address, nbytes)
            self._used.append(nbytes)

        self._streams.copy.append(move)
        ticket = self._streams.ticket(self._streams.copy)
        self._streams.let_pass()
        return ticket

    def take_use(self) -> LinkUse:
        nbytes = 0
        while self._used:
            nbytes += self._used.popleft()
        return LinkUse(nbytes, nbytes / NBYTES_PER_S)


class LazyDevice:
    """See the module. `open_link` may be replaced by a link that breaks a promise."""

    kind = "lazy"
    name = "lazy"

    played_link_bytes_per_s = None

    def __init__(self, seed: int, link: Callable[[LazyStreams], LazyLink] = LazyLink) -> None:
        self.streams = LazyStreams(seed)
        self.torch_device = torch.device("cpu")
        self.pinning = NoPinning()
        self._link = link

    def compute(self, work: Callable[[], None]) -> None:
        """Queues work on the compute stream."""
        self.streams.compute.append(work)
        self.streams.let_pass()

    def memory(self) -> DeviceMemory:
        return CpuDevice().memory()

    def allocate_slots(self, num_slots: int, slot_nbytes: int) -> torch.Tensor:
        return CpuDevice().allocate_slots(num_slots, slot_nbytes)

    def open_link(self) -> LazyLink:
        return self._link(self.streams)

    def index_rows(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor(rows)

    def copy_to_host(self, hidden_TD: torch.Tensor, index_R: torch.Tensor | None) -> HostCopy:
        return CpuDevice().copy_to_host(hidden_TD, index_R)

    def mark_compute(self) -> CopyTicket:
        return self.streams.ticket(self.streams.compute)

    def wait_begins(self) -> None:
        """Nothing is measured."""

    def take_compute_stall_s(self, host_wait_s: float) -> float:
        return host_wait_s

    def synchronize(self) -> None:
        self.streams.drain()
