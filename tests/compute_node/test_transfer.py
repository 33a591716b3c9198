"""The transfer engine: order, chunks, what is in flight, failures. The links here record and obey the test."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.copy_ticket import CopyTicket
from compute_node.device.cpu import DONE, CpuLink
from compute_node.device.seam import Link
from compute_node.load_queue import ChunkSettings
from compute_node.loads import Load, LoadState
from compute_node.transfer import TransferEngine
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason
from tests.compute_node.held_links import (
    DEADLINE_S,
    RECORDED_BYTES_PER_S,
    BuggyLink,
    FailingLink,
    GatedLink,
    HeldTicket,
    RecordingLink,
)


def engine(link: Link, chunk_nbytes: int = 100, max_chunks_in_flight: int = 2) -> TransferEngine:
    return TransferEngine(lambda: link, ChunkSettings(chunk_nbytes, max_chunks_in_flight))


@contextmanager
def held_engine(link: RecordingLink, max_chunks_in_flight: int = 2) -> Iterator[TransferEngine]:
    """Copies arrive when the test says so, and at its end."""
    with engine(link, max_chunks_in_flight=max_chunks_in_flight) as transfers:
        try:
            yield transfers
        finally:
            link.let_go()


def load(number: int, nbytes: int, after: CopyTicket = DONE, reason: LoadReason = LoadReason.DEMAND) -> Load:
    return Load(ExpertId(0, number), 10_000 * number, 1_000_000 + 10_000 * number, nbytes, after, DONE, reason)


def sources(link: RecordingLink) -> list[int]:
    return [source for _, source, _ in link.copies]


def test_a_load_is_cut_into_chunks_that_cover_it_once() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=9) as transfers:
        asked = load(1, 250)
        transfers.submit([asked])
        assert transfers.next_issued([asked]) is asked
        assert link.copies == [(1_010_000, 10_000, 100), (1_010_100, 10_100, 100), (1_010_200, 10_200, 50)]
        assert asked.ticket is link.tickets[-1]
        assert transfers.stats().uploaded_nbytes == 250


def test_no_more_than_the_allowed_chunks_are_in_flight() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=2) as transfers:
        asked = load(1, 500)
        transfers.submit([asked])
        for arrived in range(3):
            link.wait_for_copies(arrived + 2)
            assert len(link.copies) == arrived + 2, "the third waits for the first"
            link.tickets[arrived].arrived.set()
        link.wait_for_copies(5)
        transfers.next_issued([asked])


def test_loads_are_served_in_the_order_they_were_asked_for() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=9) as transfers:
        first, second, third = (load(number, 100) for number in (3, 1, 2))
        transfers.submit([first, second])
        transfers.submit([third])
        for expected in (first, second, third):
            assert transfers.next_issued([expected]) is expected
        assert [source for _, source, _ in link.copies] == [30_000, 10_000, 20_000]


def test_a_slot_is_overwritten_only_behind_the_compute_that_reads_it() -> None:
    link = RecordingLink()
    reading = HeldTicket()
    with held_engine(link) as transfers:
        asked, free = load(1, 10, after=reading), load(2, 10)
        transfers.submit([asked, free])
        transfers.next_issued([free])
        assert link.ordered_after == [reading]


def test_a_failed_load_says_why_and_the_next_one_is_served() -> None:
    with engine(FailingLink(refused=10_000)) as transfers:
        bad, good = load(1, 100), load(2, 100)
        transfers.submit([bad, good])
        assert transfers.next_issued([good]) is good
        with pytest.raises(Unavailable, match="the link broke"):
            transfers.next_issued([bad])
        assert bad.state is LoadState.FAILED


def test_a_paused_load_is_not_copied_until_it_is_submitted_again() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=1) as transfers:
        running, queued, last = load(1, 200), load(2, 100), load(3, 100)
        transfers.submit([running, queued, last])
        link.wait_for_copies(1)
        transfers.pause([queued])
        transfers.settle([queued])
        link.let_go()
        transfers.next_issued([last])
        assert 20_000 not in sources(link)
        assert queued.state is LoadState.PAUSED
        transfers.submit([queued])
        assert transfers.next_issued([queued]) is queued


def test_a_prefetch_gives_way_between_two_chunks_and_goes_on_where_it_stopped() -> None:
    link = RecordingLink()
    reading = HeldTicket()
    with held_engine(link, max_chunks_in_flight=1) as transfers:
        prefetch = load(1, 250, after=reading, reason=LoadReason.PREFETCH)
        transfers.submit([prefetch])
        link.wait_for_copies(1)
        demand = load(2, 100)
        transfers.submit([demand])
        assert transfers.queued_nbytes() == 250
        link.let_go()
        assert transfers.next_issued([demand, prefetch]) is demand
        transfers.next_issued([prefetch])
        assert sources(link) == [10_000, 20_000, 10_100, 10_200]
        assert link.ordered_after == [reading, reading], "also when it goes on"
        assert transfers.queued_nbytes() == 0
        assert transfers.stats().nbytes_by_reason == {
            LoadReason.DEMAND: 100,
            LoadReason.PREFETCH: 250,
            LoadReason.STREAM: 0,
        }


def test_a_promoted_prefetch_goes_before_the_others() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=1) as transfers:
        first, second, third = (load(number, 100, reason=LoadReason.PREFETCH) for number in (1, 2, 3))
        transfers.submit([first, second, third])
        link.wait_for_copies(1)
        transfers.promote(third)
        link.let_go()
        transfers.next_issued([second])
        assert sources(link) == [10_000, 30_000, 20_000]
        assert third.reason is LoadReason.DEMAND


@pytest.mark.parametrize(("nbytes", "state"), [(200, LoadState.PAUSED), (100, LoadState.ISSUED)])
def test_pausing_does_not_wait_for_the_chunk_under_way_and_settling_does(nbytes: int, state: LoadState) -> None:
    link = GatedLink()
    settled = threading.Event()
    with engine(link) as transfers:
        running = load(1, nbytes, reason=LoadReason.PREFETCH)
        transfers.submit([running])
        link.wait_for_copies(1)
        transfers.pause([running])
        assert running.state is LoadState.PAUSED
        assert transfers.queued_nbytes() == 0

        def settle() -> None:
            transfers.settle([running])
            settled.set()

        waiter = threading.Thread(target=settle)
        waiter.start()
        assert running.copied_nbytes == 0
        assert not settled.is_set()
        link.gate.release()
        waiter.join(DEADLINE_S)
        assert settled.is_set()
        assert (running.state, running.copied_nbytes) == (state, 100)


def test_a_chunk_that_nobody_knows_any_more_is_waited_for_by_its_expert() -> None:
    """Its load was paused and its slot given up: what may not happen is that its source is unmapped meanwhile."""
    link = GatedLink()
    settled = threading.Event()
    with engine(link) as transfers:
        transfers.submit([forgotten := load(1, 200, reason=LoadReason.PREFETCH)])
        link.wait_for_copies(1)
        transfers.pause([forgotten])
        transfers.settle_expert(ExpertId(0, 2))  # another's

        def settle() -> None:
            transfers.settle_expert(ExpertId(0, 1))
            settled.set()

        waiter = threading.Thread(target=settle)
        waiter.start()
        assert not settled.wait(0.05)
        link.gate.release()
        waiter.join(DEADLINE_S)
        assert settled.is_set()
        transfers.settle_expert(ExpertId(0, 1))


def test_of_several_the_one_that_was_issued_first_is_next() -> None:
    link = RecordingLink()
    with held_engine(link, max_chunks_in_flight=9) as transfers:
        loads = [load(number, 100) for number in (1, 2, 3)]
        transfers.submit(loads)
        transfers.next_issued([loads[2]])
        for expected in (loads[0], loads[1], loads[2]):
            assert transfers.next_issued(loads[::-1]) is expected
            loads.remove(expected)


def test_the_link_rate_is_what_the_link_measured_of_what_arrived() -> None:
    link = RecordingLink()
    with held_engine(link) as transfers:
        held = load(1, 200)
        transfers.submit([held])
        transfers.next_issued([held])
        assert transfers.link_bytes_per_s() is None, "chunks under way are not measured, however long they wait"
        link.let_go()
        asked = load(2, 1000)
        transfers.submit([asked])
        transfers.next_issued([asked])
        assert transfers.link_bytes_per_s() == pytest.approx(RECORDED_BYTES_PER_S)
        assert transfers.stats().link_busy_s == pytest.approx(1200 / RECORDED_BYTES_PER_S)
        assert asked.begin_s < asked.end_s


def test_after_close_no_copy_is_under_way() -> None:
    link = RecordingLink()
    transfers = engine(link)
    transfers.start()
    transfers.submit([load(0, 100)])
    link.wait_for_copies(1)
    closer = threading.Thread(target=transfers.close)
    closer.start()
    assert link.tickets[0].awaited.wait(DEADLINE_S), "the memory of a copy under way is not given back"
    assert closer.is_alive()
    link.tickets[0].arrived.set()
    closer.join(DEADLINE_S)
    assert not closer.is_alive()


def test_close_wakes_who_waits() -> None:
    link = RecordingLink()
    transfers = engine(link, max_chunks_in_flight=9)
    transfers.start()
    never = load(1, 100)
    failures: list[str] = []

    def wait() -> None:
        try:
            transfers.next_issued([never])
        except Unavailable as error:
            failures.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    transfers.close()
    waiter.join(DEADLINE_S)
    assert failures == ["The transfer engine is closed."]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_not_taken_for_one_that_was_closed() -> None:
    with engine(BuggyLink()) as transfers:
        asked = load(1, 100)
        transfers.submit([asked])
        with pytest.raises(AssertionError, match="the transfer thread died"):
            transfers.next_issued([asked])
        transfers.pause([asked])
        transfers.settle([asked])


def test_a_thread_that_cannot_open_its_link_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(str(args.exc_value)))

    def broken() -> Link:
        raise RuntimeError("no such device")

    transfers = TransferEngine(broken, ChunkSettings(100, 2))
    transfers.start()
    for _ in range(2):
        with pytest.raises(AssertionError, match="the transfer thread died"):
            transfers.next_issued([load(1, 100)])
    transfers.close()
    assert seen == ["no such device"]
    assert transfers.link_description == "closed"


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=12),
    chunk_nbytes=st.integers(1, 700),
    in_flight=st.integers(1, 4),
)
def test_every_byte_arrives_at_its_place(sizes: list[int], chunk_nbytes: int, in_flight: int) -> None:
    source = bytes(number % 251 for number in range(sum(sizes)))
    source_buffer = ctypes.create_string_buffer(source, len(source))
    destination = ctypes.create_string_buffer(len(source))
    loads: list[Load] = []
    offset = 0
    for number, nbytes in enumerate(sizes):
        loads.append(
            Load(
                ExpertId(0, number),
                ctypes.addressof(source_buffer) + offset,
                ctypes.addressof(destination) + offset,
                nbytes,
                DONE,
                DONE,
            )
        )
        offset += nbytes
    with engine(CpuLink(), chunk_nbytes, in_flight) as transfers:
        transfers.submit(loads)
        for asked in loads:
            transfers.next_issued([asked]).ticket.wait_on_host()
        assert transfers.stats().uploaded_nbytes == len(source)
    assert destination.raw == source


def test_an_emulated_link_keeps_its_rate() -> None:
    """The link's own clock says when each byte would have arrived, however late the sleeper woke."""
    link = CpuLink(bytes_per_s=50_000_000.0)
    buffer = ctypes.create_string_buffer(1_000_000)
    target = ctypes.create_string_buffer(1_000_000)
    with engine(link, chunk_nbytes=100_000) as transfers:
        asked = Load(ExpertId(0, 0), ctypes.addressof(buffer), ctypes.addressof(target), 1_000_000, DONE, DONE)
        transfers.submit([asked])
        transfers.next_issued([asked])
        stats, rate = transfers.stats(), transfers.link_bytes_per_s()
    assert link.description == "emulated"
    assert stats.link_busy_s >= 1_000_000 / 50_000_000.0 - 1e-3, "no byte arrives before the link could carry it"
    assert rate is not None
    assert rate <= 50_000_000.0 * 1.05
