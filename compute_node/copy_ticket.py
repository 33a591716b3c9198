"""How the end of a copy, or of compute, is waited for. Knows no device."""

from typing import Protocol


class CopyTicket(Protocol):
    """One chunk's copy, under way or done."""

    def is_done(self) -> bool:
        """True when the bytes have arrived; never blocks."""

    def wait_on_host(self) -> None:
        """Blocks the calling thread until the bytes have arrived; never spins."""

    def wait_on_compute(self) -> None:
        """Makes compute that is issued from now on wait for the bytes; does not block the host where it can."""
