"""What packing and checking tell about where they are."""

from typing import Protocol


class PackProgress(Protocol):
    """Told about steps by the packer; calls come from several threads, one phase after the other."""

    def begin(self, title: str, total_nbytes: int, num_layers: int) -> None:
        """A phase starts."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes of the phase are done."""

    def finish_layer(self) -> None:
        """One more layer of the phase is done."""

    def note(self, sentence: str) -> None:
        """Something a person may want to know."""


class NoProgress:
    """Says nothing."""

    def begin(self, title: str, total_nbytes: int, num_layers: int) -> None:
        """Ignored."""

    def advance(self, nbytes: int) -> None:
        """Ignored."""

    def finish_layer(self) -> None:
        """Ignored."""

    def note(self, sentence: str) -> None:
        """Ignored."""
