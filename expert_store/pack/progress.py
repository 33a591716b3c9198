"""How packing and checking tell a person where they are."""

from typing import Protocol


class PackProgress(Protocol):
    """Told about steps by the packer; calls come from several threads."""

    def begin(self, title: str, total_nbytes: int) -> None:
        """A phase starts."""

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done."""

    def note(self, sentence: str) -> None:
        """Something a person may want to know."""


class NoProgress:
    """Says nothing."""

    def begin(self, title: str, total_nbytes: int) -> None:
        """Ignored."""

    def advance(self, nbytes: int) -> None:
        """Ignored."""

    def note(self, sentence: str) -> None:
        """Ignored."""
