"""A played link: real bytes in the queue's order, at the link's rate, without a thread."""

import ctypes
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.device.cpu import DONE, CpuDevice
from compute_node.emulated_transfers import EmulatedTransfers
from compute_node.expert_path import transfers_over
from compute_node.load_queue import ChunkSettings
from compute_node.loads import Load, LoadState
from compute_node.schedule import POLICIES
from compute_node.transfer import TransferEngine
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason
from tests.compute_node.test_prefetch import begin, stack, use

BLOB_NBYTES = 1000


class Copies:
    """Blobs and slots in ordinary memory."""

    def __init__(self, num_loads: int) -> None:
        self.source = ctypes.create_string_buffer(bytes(index % 251 for index in range(num_loads * BLOB_NBYTES)))
        self.destination = ctypes.create_string_buffer(num_loads * BLOB_NBYTES)
        self.loads = [
            Load(
                ExpertId(0, number),
                ctypes.addressof(self.source) + number * BLOB_NBYTES,
                ctypes.addressof(self.destination) + number * BLOB_NBYTES,
                BLOB_NBYTES,
                DONE,
                DONE,
            )
            for number in range(num_loads)
        ]

    def has_arrived(self, number: int) -> bool:
        """Every byte of it."""
        part = slice(number * BLOB_NBYTES, (number + 1) * BLOB_NBYTES)
        return self.destination.raw[part] == self.source.raw[part]


@settings(max_examples=30, deadline=None)
@given(
    urgent=st.lists(st.booleans(), min_size=1, max_size=6),
    chunk_nbytes=st.sampled_from([None, 64, 999]),
    in_flight=st.integers(1, 3),
)
def test_every_byte_arrives_and_demand_goes_first(urgent: list[bool], chunk_nbytes: int | None, in_flight: int) -> None:
    copies = Copies(len(urgent))
    with EmulatedTransfers(1e9, ChunkSettings(chunk_nbytes, in_flight)) as transfers:
        for load, is_urgent in zip(copies.loads, urgent, strict=True):
            load.reason = LoadReason.DEMAND if is_urgent else LoadReason.PREFETCH
            load.rank = 1.0
        transfers.submit(copies.loads)
        waiting = list(copies.loads)
        while waiting:
            load = transfers.next_issued(waiting)
            load.ticket.wait_on_host()
            assert load.has_arrived
            waiting.remove(load)
        assert transfers.queued_nbytes() == 0
        assert transfers.stats().uploaded_nbytes == len(urgent) * BLOB_NBYTES
    assert all(copies.has_arrived(number) for number in range(len(urgent)))
    ends = [load.end_s for load, is_urgent in zip(copies.loads, urgent, strict=True) if is_urgent]
    assert ends == sorted(ends), "demand loads in the order they were asked for"


def test_a_load_takes_as_long_as_the_link_says() -> None:
    copies = Copies(4)
    with EmulatedTransfers(4 * BLOB_NBYTES / 0.05, ChunkSettings(None, 1)) as transfers:
        began_s = time.perf_counter()
        transfers.submit(copies.loads)
        assert not copies.loads[3].has_arrived
        for load in copies.loads:
            transfers.next_issued([load]).ticket.wait_on_host()
        assert time.perf_counter() - began_s >= 0.05
        assert transfers.link_bytes_per_s() == pytest.approx(4 * BLOB_NBYTES / 0.05)
        assert transfers.stats().link_busy_s == pytest.approx(0.05)


def test_what_is_urgent_overtakes_between_two_chunks() -> None:
    copies = Copies(2)
    slow, urgent = copies.loads
    slow.reason, slow.rank = LoadReason.PREFETCH, 1.0
    with EmulatedTransfers(BLOB_NBYTES / 0.05, ChunkSettings(100, 1)) as transfers:
        transfers.submit([slow])
        transfers.submit([urgent])
        assert transfers.next_issued([slow, urgent]) is urgent
        assert slow.state is LoadState.QUEUED
        assert 0 < slow.copied_nbytes < BLOB_NBYTES


def test_a_paused_load_keeps_its_bytes_and_goes_on() -> None:
    copies = Copies(1)
    (load,) = copies.loads
    load.reason, load.rank = LoadReason.PREFETCH, 1.0
    with EmulatedTransfers(BLOB_NBYTES / 0.02, ChunkSettings(100, 1)) as transfers:
        transfers.submit([load])
        transfers.pause([load])
        transfers.settle([load])
        kept_nbytes = load.copied_nbytes
        assert load.state is LoadState.PAUSED
        assert 0 < kept_nbytes < BLOB_NBYTES
        transfers.submit([load])
        transfers.promote(load)
        assert transfers.next_issued([load]) is load
        assert transfers.stats().uploaded_nbytes == BLOB_NBYTES
    assert copies.has_arrived(0)


def test_nobody_waits_for_a_closed_link() -> None:
    copies = Copies(1)
    transfers = EmulatedTransfers(1.0, ChunkSettings(100, 1))
    transfers.submit(copies.loads)
    transfers.close()
    with pytest.raises(Unavailable, match="closed"):
        transfers.next_issued(copies.loads)


def test_another_thread_may_take_loads_away_meanwhile() -> None:
    copies = Copies(40)
    for rank, load in enumerate(copies.loads[1:]):
        load.reason, load.rank = LoadReason.PREFETCH, float(rank)
    with EmulatedTransfers(40 * BLOB_NBYTES / 0.1, ChunkSettings(50, 2)) as transfers:
        transfers.submit(copies.loads)

        def take_away() -> None:
            for load in copies.loads[20:]:
                transfers.pause([load])

        taker = threading.Thread(target=take_away)
        taker.start()
        for load in copies.loads[:20]:
            transfers.next_issued([load]).ticket.wait_on_host()
        taker.join()
        transfers.settle(copies.loads[20:])
    assert all(copies.has_arrived(number) for number in range(20))


def test_only_a_played_link_does_without_a_thread() -> None:
    chunks = ChunkSettings(None, 1)
    assert isinstance(transfers_over(CpuDevice(), chunks), TransferEngine)
    assert isinstance(transfers_over(CpuDevice(1e6), chunks), EmulatedTransfers)


@pytest.mark.parametrize("name", POLICIES)
def test_the_cache_hands_out_the_right_experts_over_a_played_link(name: str) -> None:
    policy = replace(POLICIES[name], chunk_nbytes=512)
    with stack(policy, 3, link_bytes_per_s=50e6) as opened:
        assert isinstance(opened.transfers, EmulatedTransfers)
        for step in range(1, 5):
            begin(opened, step)
            for layer in range(4):
                use(opened, layer, [[(step + layer) % 8, (step * 3 + layer) % 8]])


def test_two_threads_may_wait_at_once() -> None:
    """The store client's for a load that was paused, the engine's for one that it needs."""
    copies = Copies(2)
    paused, needed = copies.loads
    paused.reason = LoadReason.PREFETCH
    with EmulatedTransfers(BLOB_NBYTES / 0.1, ChunkSettings(BLOB_NBYTES // 10, 2)) as transfers:
        transfers.submit([paused])
        transfers.catch_up()
        transfers.submit([needed])
        transfers.pause([paused])
        settled = threading.Event()

        def settle() -> None:
            transfers.settle([paused])
            settled.set()

        settling = threading.Thread(target=settle)
        settling.start()
        assert transfers.next_issued([needed]) is needed
        needed.ticket.wait_on_host()
        settling.join()
        assert settled.is_set()
        assert copies.has_arrived(1)
