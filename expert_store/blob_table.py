"""Which blobs are published, who reads them, and when a withdrawn one may be written again.

One owner: the store's event loop. Knows no sockets: each node's lease gets its events through a callback.

    EMPTY ──publish──► PUBLISHED ──retire──► RETIRED ──last node acknowledged──► REUSABLE ──publish──► PUBLISHED

Every lease holds everything that was published while it existed, until the node acknowledges a retirement or the
lease ends. A published blob's bytes never change.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from expert_store.arena import ArenaLayout
from expert_store.directory import Directory, DirectoryEntry
from promoe.errors import InvalidInput
from promoe.ids import ExpertId

_GENERATIONS_OUT_OF_SIGHT: Final = 1 << 16


class BlobState(Enum):
    """See the module's docstring."""

    EMPTY = "empty"
    PUBLISHED = "published"
    RETIRED = "retired"
    REUSABLE = "reusable"


@dataclass(frozen=True)
class PublishedBlob:
    """Where a node finds a blob."""

    expert: ExpertId
    offset: int
    generation: int


@dataclass(frozen=True)
class TableSent:
    """Everything published so far; replaces what the node knew."""

    blobs: tuple[PublishedBlob, ...]
    complete: bool


@dataclass(frozen=True)
class BlobsAdded:
    """Further blobs were published; `complete` as in `TableSent`."""

    blobs: tuple[PublishedBlob, ...]
    complete: bool


@dataclass(frozen=True)
class BlobWithdrawn:
    """The node must stop reading this blob and say so."""

    expert: ExpertId
    generation: int
    reason: str


StoreEvent = TableSent | BlobsAdded | BlobWithdrawn


@dataclass
class Lease:
    """One compute node's hold on the published blobs.

    Attributes:
        node_instance_id: the node process.
        pid: as the node says, for people.
        kernel_pid: as the kernel says; 0 when the node is in another pid namespace.
        send: takes the node's events; None for a node that held the adopted arena and has not come back yet.
        unacknowledged: places of retired blobs that the node may still read.
    """

    node_instance_id: str
    pid: int
    kernel_pid: int
    send: Callable[[StoreEvent], None] | None
    unacknowledged: set[int] = field(default_factory=set)
    since: float = field(default_factory=time.perf_counter)

    @property
    def held_s(self) -> float:
        """Since the node attached."""
        return time.perf_counter() - self.since


@dataclass
class _Retirement:
    generation: int
    reason: str
    on_reusable: Callable[[], None] | None = None


class BlobTable:
    """The table of one arena.

    Args:
        layout: which blobs there are.
        directory: the arena's. What it does not show to be intact and published, but to be used, starts RETIRED: nodes
            that an earlier store served may read it.
        checksums: xxh3-64 by the blob's place, from the pack's manifest.
    """

    def __init__(self, layout: ArenaLayout, directory: Directory, checksums: Sequence[int]) -> None:
        assert len(directory) == layout.num_blobs == len(checksums), "directory and pack belong to one model"
        self._layout = layout
        self._directory = directory
        self._checksums = checksums
        self._states = [BlobState.EMPTY] * layout.num_blobs
        self._generations = [0] * layout.num_blobs
        self._retirements: dict[int, _Retirement] = {}
        self._leases: dict[str, Lease] = {}
        self._num_empty = layout.num_blobs
        self._take_over()

    @property
    def leases(self) -> list[Lease]:
        """All leases, those of absent nodes too."""
        return list(self._leases.values())

    @property
    def num_published_once(self) -> int:
        """Blobs that have been published, those that were withdrawn since included."""
        return self._layout.num_blobs - self._num_empty

    @property
    def is_complete(self) -> bool:
        """True when every blob has been published once."""
        return self._num_empty == 0

    def indices(self, state: BlobState) -> list[int]:
        """Places of the blobs in this state, in order."""
        return [index for index, found in enumerate(self._states) if found is state]

    def count(self, state: BlobState) -> int:
        """How many blobs are in this state."""
        return self._states.count(state)

    def publish(self, indices: Sequence[int]) -> None:
        """Announces blobs whose verified bytes are in place."""
        for index in indices:
            state = self._states[index]
            assert state in (BlobState.EMPTY, BlobState.REUSABLE), f"blob {index} is {state.value}: it may be read"
            self._num_empty -= state is BlobState.EMPTY
            self._states[index] = BlobState.PUBLISHED
            self._generations[index] += 1
            self._directory.write(index, DirectoryEntry(True, self._generations[index], self._checksums[index]))
        self._send_all(BlobsAdded(tuple(self._published(index) for index in indices), self.is_complete))

    def retire(self, index: int, reason: str) -> None:
        """Withdraws a published blob."""
        assert self._states[index] is BlobState.PUBLISHED, f"blob {index} is {self._states[index].value}"
        generation = self._generations[index]
        self._directory.write(index, DirectoryEntry(False, generation, self._checksums[index]))
        self._states[index] = BlobState.RETIRED
        self._retirements[index] = _Retirement(generation, reason)
        for lease in self._leases.values():
            lease.unacknowledged.add(index)
        self._send_all(BlobWithdrawn(self._layout.expert_at(index), generation, reason))
        self._settle(index)

    def when_reusable(self, index: int, callback: Callable[[], None]) -> None:
        """Calls back once, when no node reads the retired blob any more: at once if none does now."""
        retirement = self._retirements.get(index)
        if retirement is None:
            assert self._states[index] is BlobState.REUSABLE, f"blob {index} is {self._states[index].value}"
            callback()
            return
        assert retirement.on_reusable is None, f"somebody waits for blob {index} already"
        retirement.on_reusable = callback
        self._settle(index)

    def attach(self, lease: Lease, knows_arena: bool) -> None:
        """Starts a lease and sends it the table.

        Args:
            lease: replaces the same node's former one.
            knows_arena: the node has this arena mapped already, so that it may read blobs that were retired while it
                was away: these are sent as withdrawn, to be acknowledged.
        """
        assert lease.send is not None, "an attached node takes events"
        former = self._leases.get(lease.node_instance_id)
        self._leases[lease.node_instance_id] = lease
        published = tuple(self._published(index) for index in self.indices(BlobState.PUBLISHED))
        lease.send(TableSent(published, self.is_complete))
        if knows_arena:
            for index, retirement in self._retirements.items():
                lease.unacknowledged.add(index)
                lease.send(BlobWithdrawn(self._layout.expert_at(index), retirement.generation, retirement.reason))
        if former is not None:
            self._settle_all()

    def expect(self, node_instance_id: str, pid: int) -> None:
        """Keeps a place for a node that held this arena when the former store died, until it attaches or is dropped."""
        lease = Lease(node_instance_id, pid, pid, send=None, unacknowledged=set(self._retirements))
        self._leases.setdefault(node_instance_id, lease)

    def acknowledge(self, lease: Lease, expert: ExpertId, generation: int) -> None:
        """The node no longer reads a retired blob. Repeating it does no harm.

        Raises:
            InvalidInput: the model has no such expert.
        """
        try:
            index = self._layout.index_of(expert)
        except ValueError as error:
            raise InvalidInput(f"A node acknowledged {error}.") from error
        retirement = self._retirements.get(index)
        if retirement is not None and retirement.generation == generation:
            lease.unacknowledged.discard(index)
            self._settle(index)

    def drop(self, lease: Lease) -> None:
        """The node is gone: it reads nothing any more. A lease that was replaced or dropped already is ignored."""
        if self._leases.get(lease.node_instance_id) is lease:
            del self._leases[lease.node_instance_id]
            self._settle_all()

    def drop_absent(self) -> list[Lease]:
        """Gives up the nodes that were expected and did not come; returns them."""
        absent = [lease for lease in self._leases.values() if lease.send is None]
        for lease in absent:
            self.drop(lease)
        return absent

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        for index, state in enumerate(self._states):
            entry = self._directory.read(index)
            published = entry is not None and entry.published
            assert published == (state is BlobState.PUBLISHED), f"directory and table differ at {index}"
            assert self._directory.is_unused(index) == (state is BlobState.EMPTY), f"{index} was used"
            if published:
                assert entry == DirectoryEntry(True, self._generations[index], self._checksums[index])
            assert (index in self._retirements) == (state is BlobState.RETIRED)
        assert self._num_empty == self.count(BlobState.EMPTY)

    def _take_over(self) -> None:
        entries = [self._directory.read(index) for index in range(self._layout.num_blobs)]
        highest = max((entry.generation for entry in entries if entry is not None), default=0)
        for index, entry in enumerate(entries):
            if self._directory.is_unused(index):
                continue
            self._num_empty -= 1
            # The generation of a torn entry is unknown: one that no node can have seen takes its place.
            self._generations[index] = entry.generation if entry else highest + _GENERATIONS_OUT_OF_SIGHT
            if entry is not None and entry.published and entry.checksum == self._checksums[index]:
                self._states[index] = BlobState.PUBLISHED
            else:
                self._states[index] = BlobState.RETIRED
                reason = f"{self._layout.expert_at(index)} was not whole when the store ended; it is read again."
                self._retirements[index] = _Retirement(self._generations[index], reason)

    def _published(self, index: int) -> PublishedBlob:
        return PublishedBlob(self._layout.expert_at(index), self._layout.offset_of(index), self._generations[index])

    def _send_all(self, event: StoreEvent) -> None:
        for lease in self._leases.values():
            if lease.send is not None:
                lease.send(event)

    def _settle_all(self) -> None:
        for index in list(self._retirements):
            self._settle(index)

    def _settle(self, index: int) -> None:
        if any(index in lease.unacknowledged for lease in self._leases.values()):
            return
        retirement = self._retirements.pop(index)
        self._states[index] = BlobState.REUSABLE
        if retirement.on_reusable is not None:
            retirement.on_reusable()
