"""Links for tests of the transfer engine: they record what they are given and obey the test."""

import threading
from dataclasses import dataclass, field

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cpu import DONE
from compute_node.device.seam import LinkUse
from promoe.errors import Unavailable

DEADLINE_S = 30.0
RECORDED_BYTES_PER_S = 1e6


@dataclass
class HeldTicket:
    """A copy that arrives when the test says so."""

    arrived: threading.Event = field(default_factory=threading.Event)
    awaited: threading.Event = field(default_factory=threading.Event)

    def is_done(self) -> bool:
        return self.arrived.is_set()

    def wait_on_host(self) -> None:
        self.awaited.set()
        assert self.arrived.wait(DEADLINE_S), "the test lets every copy arrive"

    def wait_on_compute(self) -> None:
        self.wait_on_host()


class RecordingLink:
    """Remembers every copy; tickets are held back."""

    description = "recording"

    def __init__(self) -> None:
        self.copies: list[tuple[int, int, int]] = []
        self.tickets: list[HeldTicket] = []
        self.is_held = True
        self.ordered_after: list[CopyTicket] = []
        self.changed = threading.Condition()
        self._num_used = 0

    def order_after(self, compute: CopyTicket) -> None:
        self.ordered_after.append(compute)

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        ticket = HeldTicket()
        with self.changed:
            if not self.is_held:
                ticket.arrived.set()
            self.copies.append((destination_address, source_address, nbytes))
            self.tickets.append(ticket)
            self.changed.notify_all()
        return ticket

    def take_use(self) -> LinkUse:
        """As if each byte had taken a microsecond."""
        nbytes = 0
        with self.changed:
            while self._num_used < len(self.tickets) and self.tickets[self._num_used].is_done():
                nbytes += self.copies[self._num_used][2]
                self._num_used += 1
        return LinkUse(nbytes, nbytes / RECORDED_BYTES_PER_S)

    def let_go(self) -> None:
        """Every copy arrives, the coming ones at once."""
        with self.changed:
            self.is_held = False
            for ticket in self.tickets:
                ticket.arrived.set()

    def wait_for_copies(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.copies) >= count, DEADLINE_S), "the link was given the copies"


@dataclass
class FailingLink:
    """Refuses one source address."""

    refused: int
    description: str = "failing"

    def order_after(self, compute: CopyTicket) -> None:
        """Nothing to order."""

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        if source_address == self.refused:
            raise Unavailable("the link broke")
        return DONE

    def take_use(self) -> LinkUse:
        """Too quick to be measured."""
        return LinkUse(0, 0.0)


class GatedLink(RecordingLink):
    """A copy returns when the test says so, as one by the CPU does when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        super().copy(destination_address, source_address, nbytes)
        assert self.gate.acquire(timeout=DEADLINE_S), "the test opens the gate"
        return DONE


class BuggyLink(RecordingLink):
    """Fails in a way that no load is blamed for."""

    def copy(self, destination_address: int, source_address: int, nbytes: int) -> CopyTicket:
        raise RuntimeError("a bug")
