"""A compute node without a model: the second implementations of the seams that the store's client works with."""

import ctypes
import threading

from compute_node.store_client import AttachProgress, StoreClient
from promoe.ids import ExpertId
from promoe.model_spec import ModelSpec


class RecordingPinning:
    """Host pinning that keeps the ranges, and refuses what the driver would."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.num_drains = 0
        self.num_calls = 0

    def register(self, address: int, nbytes: int) -> None:
        """Overlapping ranges and ranges off the page borders are refused by the driver too."""
        assert address % 4096 == 0
        assert nbytes % 4096 == 0
        for other, other_nbytes in self.registered.items():
            assert address + nbytes <= other or other + other_nbytes <= address, "registered twice"
        self.registered[address] = nbytes
        self.num_calls += 1

    def unregister(self, address: int) -> None:
        """Only what is registered."""
        del self.registered[address]

    def drain(self) -> None:
        """Nothing is ever under way."""
        self.num_drains += 1

    def covers(self, address: int, nbytes: int) -> bool:
        """True when the range lies in one registration, as a copy must."""
        return any(start <= address and address + nbytes <= start + length for start, length in self.registered.items())


class RecordingListener:
    """Blob listener that keeps what it was told; `wait_for` waits for it without sleeping."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ExpertId]] = []
        self.may_retire = threading.Event()
        self.may_retire.set()
        self._changed = threading.Condition()

    def blob_retired(self, expert: ExpertId) -> None:
        """Blocks while `may_retire` is cleared, like a node that still computes."""
        self._tell("retiring", expert)
        self.may_retire.wait()
        self._tell("retired", expert)

    def blob_published(self, expert: ExpertId) -> None:
        """Kept."""
        self._tell("published", expert)

    def wait_for(self, event: str, expert: ExpertId, times: int = 1, timeout_s: float = 20.0) -> None:
        """Returns when the event was told so often."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.events.count((event, expert)) >= times, timeout_s), self.events

    def _tell(self, event: str, expert: ExpertId) -> None:
        with self._changed:
            self.events.append((event, expert))
            self._changed.notify_all()


def ignore_progress(_: AttachProgress) -> None:
    """For tests that look at the result only."""


def read_blob(client: StoreClient, expert: ExpertId, spec: ModelSpec) -> bytes:
    """The expert's bytes as a copy from the mapped arena would see them."""
    return ctypes.string_at(client.source_address(expert), spec.layout.blob_nbytes)
