"""The order of loads: random submits, promotions, pauses and chunks against what must always hold."""

from collections import deque
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from compute_node.device.cpu import DONE
from compute_node.load_queue import Chunk, ChunkSettings, LoadQueue
from compute_node.loads import Load, LoadState
from promoe.errors import Unavailable
from promoe.ids import ExpertId
from promoe.trace_events import LoadReason

ENDED = (LoadState.ISSUED, LoadState.FAILED)
WHOLE = ChunkSettings(None, 1)


def load(number: int, nbytes: int = 100, reason: LoadReason = LoadReason.DEMAND, rank: float = 0.0) -> Load:
    return Load(ExpertId(0, number), 0, 0, nbytes, DONE, DONE, reason, rank)


def moved(queue: LoadQueue) -> Iterable[Chunk]:
    """Steps the queue until it is empty."""
    while (chunk := queue.next_chunk()) is not None:
        queue.issued(DONE)
        queue.check_integrity()
        yield chunk


def test_demand_first_then_by_rank_then_by_order_of_submission() -> None:
    queue = LoadQueue(WHOLE)
    queue.submit([load(1, reason=LoadReason.PREFETCH, rank=2), load(2, reason=LoadReason.STREAM, rank=1)])
    queue.submit([load(3, reason=LoadReason.PREFETCH, rank=1), load(4), load(5, reason=LoadReason.PREFETCH, rank=0)])
    queue.submit([load(6)])
    assert len(queue) == 6
    assert [chunk.load.expert.expert for chunk in moved(queue)] == [4, 6, 5, 2, 3, 1]


@pytest.mark.parametrize(
    ("settings_", "sizes"),
    [
        (ChunkSettings(40, 1), [(1, 40), (1, 40), (1, 20), (2, 40), (2, 40), (2, 20)]),
        (ChunkSettings(40, 1, chunks_demand=False), [(1, 100), (2, 40), (2, 40), (2, 20)]),
        (ChunkSettings(None, 1), [(1, 100), (2, 100)]),
    ],
)
def test_settings_cut_demand_and_other_loads(settings_: ChunkSettings, sizes: list[tuple[int, int]]) -> None:
    queue = LoadQueue(settings_)
    queue.submit([load(2, reason=LoadReason.PREFETCH), load(1)])
    assert [(chunk.load.expert.expert, chunk.nbytes) for chunk in moved(queue)] == sizes


def test_a_promoted_load_moves_the_rest_of_it_whole_where_demand_is_not_chunked() -> None:
    queue = LoadQueue(ChunkSettings(40, 1, chunks_demand=False))
    queue.submit([asked := load(1, reason=LoadReason.PREFETCH)])
    queue.next_chunk()
    queue.promote(asked)
    assert not queue.issued(DONE)
    assert [(chunk.offset, chunk.nbytes, chunk.reason) for chunk in moved(queue)] == [(40, 60, LoadReason.DEMAND)]
    assert queue.moved_nbytes[LoadReason.PREFETCH] == 40, "the first chunk began as a prefetch's"


def test_a_chunk_begins_where_the_link_turned_to_another_load() -> None:
    queue = LoadQueue(ChunkSettings(50, 1))
    queue.submit([prefetch := load(1, reason=LoadReason.PREFETCH)])
    first = queue.next_chunk()
    queue.submit([load(2)])
    queue.issued(DONE)
    assert prefetch.state is LoadState.COPYING
    begins = [chunk.begins for chunk in moved(queue)]
    assert first is not None
    assert first.begins
    assert begins == [True, False, True]


def test_a_paused_load_ends_with_the_chunk_that_was_under_way() -> None:
    queue = LoadQueue(WHOLE)
    queue.submit([asked := load(1)])
    queue.next_chunk()
    queue.pause([asked])
    assert asked.state is LoadState.PAUSED
    assert queue.queued_nbytes == 0
    assert queue.issued(DONE), "that was its last one"
    queue.submit([asked])
    assert queue.next_chunk() is None, "an ISSUED load is not moved again"


def test_a_failed_load_leaves_the_queue_and_says_why() -> None:
    queue = LoadQueue(WHOLE)
    queue.submit([bad := load(1), good := load(2)])
    queue.next_chunk()
    queue.failed(error := Unavailable("the link broke"))
    assert bad.state is LoadState.FAILED
    assert bad.error is error
    assert [chunk.load for chunk in moved(queue)] == [good]


def test_loads_that_left_the_middle_of_the_order_are_forgotten() -> None:
    queue = LoadQueue(WHOLE)
    queue.submit([load(0, reason=LoadReason.PREFETCH, rank=-1)])
    for number in range(1, 1000):
        queue.submit([asked := load(number, reason=LoadReason.PREFETCH)])
        queue.pause([asked])
    assert len(queue._by_rank) < 100
    queue.check_integrity()


WAYS_TO_BE_WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: ChunkSettings(0, 2), "a chunk has bytes"),
    (lambda: ChunkSettings(100, 0), "nothing in flight"),
]


@pytest.mark.parametrize(("build", "reason"), WAYS_TO_BE_WRONG)
def test_sizes_that_move_nothing_are_a_broken_invariant(build: Callable[[], object], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        build()


def test_a_load_is_queued_once() -> None:
    queue = LoadQueue(WHOLE)
    queue.submit([asked := load(1)])
    with pytest.raises(AssertionError, match="L0E1 is queued already"):
        queue.submit([asked])


REASONS = st.sampled_from(list(LoadReason))


class QueueMachine(RuleBasedStateMachine):
    """Does anything to a queue, beside an oracle that keeps lists."""

    @initialize(
        chunk_nbytes=st.none() | st.integers(1, 300),
        chunks_demand=st.booleans(),
    )
    def build(self, chunk_nbytes: int | None, chunks_demand: bool) -> None:
        self.queue = LoadQueue(ChunkSettings(chunk_nbytes, 1, chunks_demand))
        self.loads: list[Load] = []
        self.demand: deque[Load] = deque()
        self.others: list[Load] = []
        self.chunk: Chunk | None = None
        self.moved_nbytes: dict[Load, int] = {}

    @rule(reason=REASONS, rank=st.integers(0, 3), nbytes=st.integers(1, 700))
    def submit_new(self, reason: LoadReason, rank: int, nbytes: int) -> None:
        new = load(len(self.loads), nbytes, reason, float(rank))
        self.loads.append(new)
        self.moved_nbytes[new] = 0
        self.queue.submit([new])
        self._expect_queued(new)

    @rule(pick=st.integers(0))
    def submit_again(self, pick: int) -> None:
        paused = [one for one in self.loads if one.state is LoadState.PAUSED]
        if paused:
            again = paused[pick % len(paused)]
            self.queue.submit([again])
            self._expect_queued(again)

    @rule(pick=st.integers(0))
    def promote(self, pick: int) -> None:
        if self.loads:
            chosen = self.loads[pick % len(self.loads)]
            self.queue.promote(chosen)
            if chosen in self.others:
                self.others.remove(chosen)
                self.demand.append(chosen)

    @rule(picks=st.lists(st.integers(0), max_size=3))
    def pause(self, picks: list[int]) -> None:
        if self.loads:
            chosen = [self.loads[pick % len(self.loads)] for pick in picks]
            self.queue.pause(chosen)
            for one in chosen:
                assert one.state in (LoadState.PAUSED, *ENDED)
                self._forget(one)

    @precondition(lambda self: self.chunk is None)
    @rule()
    def begin_chunk(self) -> None:
        self.chunk = self.queue.next_chunk()
        if self.chunk is None:
            assert not self.demand
            assert not self.others
            return
        expected = self.demand[0] if self.demand else min(self.others, key=lambda one: one.rank)
        assert self.chunk.load is expected, "demand in its order, then the smallest rank, then the first"
        assert self.chunk.offset == self.moved_nbytes[expected], "it goes on where it stopped"

    @precondition(lambda self: self.chunk is not None)
    @rule(breaks=st.booleans())
    def end_chunk(self, breaks: bool) -> None:
        chunk, self.chunk = self.chunk, None
        assert chunk is not None
        if breaks:
            self.queue.failed(Unavailable("broke"))
            self._forget(chunk.load)
            return
        self.moved_nbytes[chunk.load] += chunk.nbytes
        ended = self.queue.issued(DONE)
        assert ended == (self.moved_nbytes[chunk.load] == chunk.load.nbytes) == (chunk.load.state is LoadState.ISSUED)
        if ended:
            self._forget(chunk.load)

    @invariant()
    def holds(self) -> None:
        self.queue.check_integrity()
        assert {one for one in self.loads if one in self.queue} == {*self.demand, *self.others}
        for one in self.loads:
            assert one.copied_nbytes == self.moved_nbytes[one] <= one.nbytes
        assert sum(self.queue.moved_nbytes.values()) == sum(self.moved_nbytes.values()), "bytes are conserved"

    def teardown(self) -> None:
        """Every load that is not given up ends."""
        if self.chunk is not None:
            self.end_chunk(False)
        self.queue.submit([one for one in self.loads if one.state is LoadState.PAUSED])
        for _ in moved(self.queue):
            pass
        assert all(one.state in ENDED for one in self.loads)
        assert self.queue.queued_nbytes == 0
        assert len(self.queue) == 0

    def _expect_queued(self, one: Load) -> None:
        if one.reason is LoadReason.DEMAND:
            self.demand.append(one)
        else:
            self.others.append(one)

    def _forget(self, one: Load) -> None:
        if one in self.demand:
            self.demand.remove(one)
        if one in self.others:
            self.others.remove(one)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    chunk_nbytes=st.integers(1, 200),
    prefetches=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    num_chunks_before=st.integers(0, 8),
    demands=st.lists(st.integers(1, 500), min_size=1, max_size=4),
)
def test_demand_waits_for_no_more_than_the_chunk_under_way(
    chunk_nbytes: int, prefetches: list[int], num_chunks_before: int, demands: list[int]
) -> None:
    queue = LoadQueue(ChunkSettings(chunk_nbytes, 1))
    queue.submit([load(number, nbytes, LoadReason.PREFETCH) for number, nbytes in enumerate(prefetches)])
    for _ in range(num_chunks_before):
        if queue.next_chunk() is not None:
            queue.issued(DONE)
    under_way = queue.next_chunk()
    asked = [load(100 + number, nbytes) for number, nbytes in enumerate(demands)]
    queue.submit(asked)
    if under_way is not None:
        queue.issued(DONE)
    order = [chunk.load for chunk in moved(queue)]
    first_prefetch = next((place for place, one in enumerate(order) if one not in asked), len(order))
    assert all(one not in asked for one in order[first_prefetch:]), "no prefetch between demand loads"
    assert list(dict.fromkeys(order[:first_prefetch])) == asked, "demand loads in the order they were asked for"
