"""Virtual time: the order is the queue's, and every byte takes the time that the link's model says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_node.clocked_transfers import ClockedTransfers, LinkModel
from compute_node.device.cpu import DONE
from compute_node.load_queue import ChunkSettings
from compute_node.loads import Load, LoadState
from compute_node.replay.virtual_clock import VirtualClock, VirtualMarks
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason


def load(number: int, nbytes: int = 100, reason: LoadReason = LoadReason.DEMAND) -> Load:
    return Load(ExpertId(0, number), 0, 0, nbytes, DONE, DONE, reason)


def at_100_bytes_per_s(
    chunk_nbytes: int | None = None, in_flight: int = 1, chunk_s: float = 0.0
) -> tuple[VirtualClock, ClockedTransfers]:
    clock = VirtualClock()
    return clock, ClockedTransfers(clock, LinkModel(100.0, chunk_s), ChunkSettings(chunk_nbytes, in_flight))


def arrive(transfers: ClockedTransfers, asked: Load) -> None:
    transfers.next_issued([asked]).ticket.wait_on_compute()


def test_waiting_for_a_load_takes_its_time_on_the_link() -> None:
    clock, transfers = at_100_bytes_per_s(chunk_s=0.25)
    clock.advance(3.0)
    first, second = load(1), load(2, 50)
    transfers.submit([first, second])
    assert transfers.next_issued([first, second]) is first
    assert not first.has_arrived
    first.ticket.wait_on_compute()
    assert first.has_arrived
    assert (clock(), first.begin_s, first.end_s) == (4.25, 3.0, 4.25)
    arrive(transfers, second)
    assert (clock(), second.begin_s, second.end_s) == (5.0, 4.25, 5.0)
    assert transfers.link_bytes_per_s() == pytest.approx(150 / 2.0, rel=0.1)


def test_a_host_that_waited_wakes_a_little_later() -> None:
    clock = VirtualClock()
    transfers = ClockedTransfers(clock, LinkModel(100.0, wake_s=0.125), ChunkSettings(None, 1))
    waited_for, ahead = load(1), load(2)
    transfers.submit([waited_for])
    arrive(transfers, waited_for)
    assert clock() == 1.125
    transfers.submit([ahead])
    clock.advance(2.0)
    arrive(transfers, ahead)
    assert clock() == 3.125, "nobody waited"


def test_compute_hides_a_prefetch() -> None:
    clock, transfers = at_100_bytes_per_s()
    ahead = load(1, reason=LoadReason.PREFETCH)
    transfers.submit([ahead])
    clock.advance(0.5)
    assert not ahead.has_arrived
    clock.advance(0.5)
    assert transfers.queued_nbytes() == 0
    assert ahead.has_arrived


@pytest.mark.parametrize(("chunk_nbytes", "waited_s"), [(None, 2.0), (25, 1.25)])
def test_a_demand_load_waits_for_the_chunk_under_way(chunk_nbytes: int | None, waited_s: float) -> None:
    clock, transfers = at_100_bytes_per_s(chunk_nbytes)
    ahead = load(1, reason=LoadReason.PREFETCH)
    transfers.submit([ahead])
    demand = load(2)
    transfers.submit([demand])
    arrive(transfers, demand)
    assert clock() == waited_s
    arrive(transfers, ahead)
    assert clock() == 2.0, "no byte is moved twice"


def test_what_is_submitted_now_does_not_change_what_the_link_chose_before() -> None:
    clock, transfers = at_100_bytes_per_s()
    low, high = load(1, reason=LoadReason.PREFETCH), load(2, reason=LoadReason.PREFETCH)
    low.rank, high.rank = 2.0, 1.0
    transfers.submit([low])
    clock.advance(0.9)
    transfers.submit([high])
    clock.advance(0.2)
    assert low.has_arrived
    assert high.begin_s == 1.0


def test_a_paused_load_keeps_its_bytes_and_the_link_turns_to_the_next_one() -> None:
    clock, transfers = at_100_bytes_per_s(chunk_nbytes=10)
    ahead = load(1, reason=LoadReason.PREFETCH)
    transfers.submit([ahead])
    clock.advance(0.35)
    transfers.pause([ahead])
    assert (ahead.state, ahead.copied_nbytes) == (LoadState.PAUSED, 40)
    transfers.settle([ahead])
    assert clock() == pytest.approx(0.4), "the chunk under way ends"
    clock.advance(1.0)
    transfers.submit([ahead])
    arrive(transfers, ahead)
    assert clock() == pytest.approx(2.0)


def test_a_promoted_load_overtakes() -> None:
    clock, transfers = at_100_bytes_per_s()
    loads = [load(number, reason=LoadReason.PREFETCH) for number in range(3)]
    transfers.submit(loads)
    transfers.promote(loads[2])
    arrive(transfers, loads[2])
    assert clock() == 2.0


def test_plans_happen_in_their_order_while_somebody_waits() -> None:
    clock, transfers = at_100_bytes_per_s(chunk_nbytes=10)
    seen: list[tuple[str, float]] = []
    clock.plan(0.7, lambda: seen.append(("later", clock())))
    clock.plan(0.2, lambda: seen.append(("sooner", clock())))
    clock.plan(9.0, lambda: seen.append(("never", clock())))
    asked = load(1)
    transfers.submit([asked])
    arrive(transfers, asked)
    assert seen == [("sooner", 0.2), ("later", 0.7)]


def test_marks_of_compute_are_done_at_once() -> None:
    clock = VirtualClock()
    marks = VirtualMarks(clock)
    clock.advance(1.0)
    marks.synchronize()
    assert marks.mark_compute().is_done()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    chunk_nbytes=st.none() | st.integers(1, 100),
    in_flight=st.integers(1, 4),
    pauses_s=st.lists(st.floats(0, 2), max_size=4),
)
def test_a_busy_link_moves_every_byte_once(
    sizes: list[int], chunk_nbytes: int | None, in_flight: int, pauses_s: list[float]
) -> None:
    clock, transfers = at_100_bytes_per_s(chunk_nbytes, in_flight)
    loads = [load(number, nbytes, list(LoadReason)[number % 3]) for number, nbytes in enumerate(sizes)]
    transfers.submit(loads)
    for pause_s in pauses_s:
        clock.advance(pause_s)
        transfers.queue.check_integrity()
    for one in loads:
        arrive(transfers, one)
    assert max(one.end_s for one in loads) == pytest.approx(sum(sizes) / 100)
    assert sum(transfers.queue.moved_nbytes.values()) == sum(sizes)
    assert transfers.meter.busy_s == pytest.approx(sum(sizes) / 100)
    assert clock() == pytest.approx(max(sum(pauses_s), sum(sizes) / 100))
