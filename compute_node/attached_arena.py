"""One model's arena as the store client sees it: mapped chunk by chunk, and readable blob by blob.

Owned by the store client's thread; only `addresses` is read by others. Knows no sockets.
"""

import logging
from collections.abc import Sequence

from compute_node.arena_mapping import ArenaGeometry, ArenaMapping
from compute_node.blob_addresses import BlobAddresses, BlobListener, BlobPlace
from compute_node.device.seam import HostPinning
from compute_node.fd_client import HeldArena
from promoe.errors import Unavailable
from promoe.ids import ExpertId

logger = logging.getLogger(__name__)


class AttachedArena:
    """A blob becomes readable when its chunk is registered, and a chunk is registered when all of its blobs are there.

    Args:
        fingerprint: of the model; an arena of another one is refused.
        num_layers, num_experts: of the model.
    """

    def __init__(
        self, fingerprint: str, num_layers: int, num_experts: int, pinning: HostPinning, listener: BlobListener
    ) -> None:
        self.addresses = BlobAddresses(num_layers, num_experts, listener)
        self._fingerprint = fingerprint
        self._pinning = pinning
        self._mapping: ArenaMapping | None = None
        self._waiting: dict[int, dict[ExpertId, BlobPlace]] = {}

    @property
    def held(self) -> HeldArena | None:
        """What is mapped."""
        return HeldArena(self._mapping.geometry.uuid, self._mapping.fd) if self._mapping else None

    @property
    def kind(self) -> str | None:
        """The kind of what is mapped."""
        return self._mapping.geometry.kind if self._mapping else None

    @property
    def registered_nbytes(self) -> int:
        """Bytes that the device can copy from."""
        return self._mapping.registered_nbytes if self._mapping else 0

    @property
    def num_known(self) -> int:
        """Blobs that are readable, or will be when their chunk is registered."""
        return self.addresses.num_readable + sum(len(places) for places in self._waiting.values())

    def map(self, fd: int, geometry: ArenaGeometry) -> None:
        """Maps an arena, which owns `fd` from here. Raises as `ArenaMapping` does."""
        assert self._mapping is None, "never two arenas at once"
        self._mapping = ArenaMapping(fd, geometry, self._fingerprint, self._pinning)

    def take_table(self, geometry: ArenaGeometry, places: Sequence[BlobPlace], complete: bool) -> None:
        """Applies a whole table of the mapped arena: blobs it does not list are withdrawn.

        Raises:
            Unavailable: the table is of another arena than the one that is mapped.
        """
        if self._mapped().geometry != geometry:
            raise Unavailable("The expert store changed its arena between two answers.")
        self.addresses.withdraw_others(places)
        self._waiting.clear()
        self.take_blobs(places, complete)

    def take_blobs(self, places: Sequence[BlobPlace], complete: bool) -> None:
        """Applies further published blobs; `complete` when no more will come from the fill."""
        mapping = self._mapped()
        for place in places:
            self.addresses.index_of(place.expert)
            self._waiting.setdefault(mapping.chunk_of(place.offset), {})[place.expert] = place
        if complete:
            mapping.register_all()
        for chunk, waiting in list(self._waiting.items()):
            if len(waiting) == mapping.num_blobs_of(chunk):
                mapping.register_chunk(chunk)
            if mapping.is_registered(chunk):
                for place in self._waiting.pop(chunk).values():
                    self.addresses.expose(place, mapping.address_of(place.offset))

    def withdraw(self, expert: ExpertId) -> None:
        """Returns when nobody reads the blob."""
        for waiting in self._waiting.values():
            waiting.pop(expert, None)
        self.addresses.withdraw(expert)

    def let_go(self, reason: str) -> None:
        """Withdraws every blob, then unregisters and unmaps; the address space and the memory are free afterwards."""
        if self._mapping is None:
            return
        logger.warning("Letting go of arena %s: %s", self._mapping.geometry.uuid, reason)
        self.addresses.withdraw_all()
        self.close()

    def close(self) -> None:
        """Unregisters and unmaps; no blob may be in use any more."""
        self._waiting.clear()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.close()

    def _mapped(self) -> ArenaMapping:
        assert self._mapping is not None, "an arena is mapped before its table is applied"
        return self._mapping
