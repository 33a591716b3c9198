"""Where each expert's blob lies in this process, by the store's latest word.

Written by the store client's thread; read without a lock by anybody (one list element, replaced as a whole).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from promoe.errors import InvalidInput, Unavailable
from promoe.ids import ExpertId


class BlobListener(Protocol):
    """Who reads blobs: told when one must not be read any more. Called from the store client's thread."""

    def blob_retired(self, expert: ExpertId) -> None:
        """Returns only when no copy reads the blob and no device slot made from it will be computed with."""

    def blob_published(self, expert: ExpertId) -> None:
        """From now on `source_address` answers for this expert."""


@dataclass(frozen=True)
class BlobPlace:
    """A blob as the store announced it."""

    expert: ExpertId
    offset: int
    generation: int


class BlobAddresses:
    """Addresses and generations of one model's blobs."""

    def __init__(self, num_layers: int, num_experts: int, listener: BlobListener) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._listener = listener
        self._num_readable = 0
        self._addresses = [0] * (num_layers * num_experts)
        self._generations = [0] * (num_layers * num_experts)

    def address_of(self, expert: ExpertId) -> int:
        """Host address of the expert's blob; raises Unavailable when it is not published, or was withdrawn."""
        address = self._addresses[expert[0] * self.num_experts + expert[1]]
        if address:
            return address
        raise Unavailable(f"The expert store has withdrawn {expert}, or has not published it yet.")

    def expose(self, place: BlobPlace, address: int) -> None:
        """Makes a blob readable that can be copied from now on."""
        index = self.index_of(place.expert)
        if self._addresses[index] and self._generations[index] == place.generation:
            return
        self._num_readable += self._addresses[index] == 0
        self._generations[index] = place.generation
        self._addresses[index] = address
        self._listener.blob_published(place.expert)

    def withdraw(self, expert: ExpertId) -> None:
        """Returns when nobody reads the blob; one that is not readable is left alone."""
        index = self.index_of(expert)
        if self._addresses[index]:
            self._addresses[index] = 0
            self._num_readable -= 1
            self._listener.blob_retired(expert)

    def withdraw_all(self) -> None:
        """Before the arena is unmapped."""
        for index, address in enumerate(self._addresses):
            if address:
                self.withdraw(ExpertId(*divmod(index, self.num_experts)))

    def withdraw_others(self, places: Iterable[BlobPlace]) -> None:
        """Withdraws what a whole table does not list any more, or lists in another generation."""
        listed = {self.index_of(place.expert): place.generation for place in places}
        for index, address in enumerate(self._addresses):
            if address and listed.get(index) != self._generations[index]:
                self.withdraw(ExpertId(*divmod(index, self.num_experts)))

    @property
    def num_readable(self) -> int:
        """Experts with a readable blob."""
        return self._num_readable

    def missing(self) -> list[ExpertId]:
        """Experts without a readable blob."""
        return [ExpertId(*divmod(index, self.num_experts)) for index, a in enumerate(self._addresses) if not a]

    def index_of(self, expert: ExpertId) -> int:
        """The expert's place; raises InvalidInput for one that the model does not have."""
        if not (0 <= expert.layer < self.num_layers and 0 <= expert.expert < self.num_experts):
            raise InvalidInput(f"The expert store speaks of {expert}; the model has no such expert.")
        return expert.layer * self.num_experts + expert.expert
