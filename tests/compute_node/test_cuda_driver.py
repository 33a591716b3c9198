"""Registered ranges anywhere; on a GPU, what the registered arena, the copy stream and the bounce ring promise."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute_node.arena_mapping import ArenaMapping
from compute_node.copy_ticket import CopyTicket
from compute_node.device.cuda import BOUNCE_BUFFERS, BOUNCE_NBYTES, CudaDevice
from compute_node.device.cuda_driver import RegisteredRanges
from compute_node.device.seam import LinkUse
from tests.compute_node.test_arena_mapping import geometry_of, make_arena

BLOB_NBYTES = 1 << 20
NUM_BLOBS = 8


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    removed=st.sets(st.integers(0, 5)),
    address=st.integers(0, 40),
    nbytes=st.integers(1, 12),
)
def test_a_range_covers_what_lies_inside_it_alone(
    lengths: list[int], removed: set[int], address: int, nbytes: int
) -> None:
    ranges = RegisteredRanges()
    start, kept = 1, []
    for number, length in enumerate(lengths):
        ranges.add(start, length)
        if number in removed:
            assert ranges.remove(start)
        else:
            kept.append((start, start + length))
        start += length + number % 2  # every other one touches its neighbour
    expected = any(first <= address and address + nbytes <= last for first, last in kept)
    assert ranges.covers(address, nbytes) == expected
    assert not ranges.remove(100)


def in_another_thread(work: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def filled_mapping(device: CudaDevice) -> ArenaMapping:
    """Each blob is full of its number plus one; not registered yet."""
    geometry = geometry_of(NUM_BLOBS, BLOB_NBYTES)
    mapping = ArenaMapping(make_arena(geometry), geometry, "model", device.pinning)
    for blob in range(NUM_BLOBS):
        offset = geometry.data_offset + blob * BLOB_NBYTES
        mapping._mapping.view[offset : offset + BLOB_NBYTES] = bytes([blob + 1]) * BLOB_NBYTES
    return mapping


@pytest.mark.gpu
def test_an_arena_registered_in_one_thread_is_copied_from_in_another() -> None:
    device = CudaDevice()
    mapping = filled_mapping(device)
    # As in the node: the store client's thread has made no CUDA call before.
    in_another_thread(mapping.register_all)
    assert mapping.registered_nbytes == NUM_BLOBS * BLOB_NBYTES
    assert not device.pinning.refused
    slots_SB = device.allocate_slots(NUM_BLOBS, BLOB_NBYTES)
    tickets: list[CopyTicket] = []

    def copy_all() -> None:
        link = device.open_link()
        assert link.description == "registered"
        for blob in range(NUM_BLOBS):
            source = mapping.address_of(mapping.geometry.data_offset + blob * BLOB_NBYTES)
            tickets.append(link.copy(slots_SB[blob].data_ptr(), source, BLOB_NBYTES))

    in_another_thread(copy_all)
    for ticket in tickets:
        ticket.wait_on_compute()
    assert [(int(row.min()), int(row.max())) for row in slots_SB] == [(n + 1, n + 1) for n in range(NUM_BLOBS)]
    in_another_thread(mapping.close)


@pytest.mark.gpu
def test_what_the_driver_refuses_goes_through_the_ring() -> None:
    device = CudaDevice()
    device.pinning.register(4096, 4096)  # nothing is mapped there
    assert device.pinning.refused
    nbytes = (BOUNCE_BUFFERS + 2) * BOUNCE_NBYTES + 123
    source_B = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    slots_SB = device.allocate_slots(1, nbytes)
    link = device.open_link()
    assert link.description == "bounce"
    ticket = link.copy(slots_SB.data_ptr(), source_B.data_ptr(), nbytes)
    ticket.wait_on_host()
    assert ticket.is_done()
    assert torch.equal(slots_SB[0].cpu(), source_B)


@pytest.mark.gpu
def test_a_slot_is_overwritten_behind_its_readers_and_read_behind_its_copy() -> None:
    device = CudaDevice()
    mapping = filled_mapping(device)
    mapping.register_all()
    slots_SB = device.allocate_slots(1, BLOB_NBYTES)
    slots_SB.fill_(99)
    link = device.open_link()
    source = mapping.address_of(mapping.geometry.data_offset)
    device.synchronize()
    compute = torch.cuda.Stream()  # continuous batching computes on a stream of its own
    with torch.cuda.stream(compute):
        torch.cuda._sleep(50_000_000)
        before = slots_SB.clone()
        link.order_after(device.mark_compute())
        device.wait_begins()
        ticket = link.copy(slots_SB.data_ptr(), source, BLOB_NBYTES)
        assert not ticket.is_done(), "the readers are still at work"
        assert link.take_use() == LinkUse(0, 0.0), "nothing has arrived yet"
        ticket.wait_on_compute()
        after = slots_SB.clone()
    device.synchronize()
    assert (int(before.min()), int(before.max())) == (99, 99)
    assert (int(after.min()), int(after.max())) == (1, 1)
    sleep_s = 0.01  # 50 million clocks take longer
    assert 0 < device.take_compute_stall_s(1.0) < sleep_s, "the readers' own time is not waited for"
    use = link.take_use()
    assert (use.nbytes, use.busy_s < sleep_s) == (BLOB_NBYTES, True), "nor is it the link's"
    mapping.close()
