"""The queue between reading and predicting: bounded, in order, and fresh when it overflows."""

import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.dropping_queue import DroppingQueue
from promoe.errors import Unavailable


def drain(queue: DroppingQueue[int]) -> list[int]:
    queue.close()
    items: list[int] = []
    while (item := queue.get()) is not None:
        items.append(item)
    return items


@given(st.integers(1, 6), st.lists(st.booleans(), max_size=40))
def test_it_keeps_order_and_its_bound_and_drops_the_oldest_droppable(capacity: int, droppable: list[bool]) -> None:
    queue, model = DroppingQueue[int](capacity), deque[tuple[int, bool]]()
    num_dropped = 0
    for number, may_drop in enumerate(droppable, start=1):
        queue.put(number, may_drop)
        if len(model) == capacity:
            model.remove(next((entry for entry in model if entry[1]), model[0]))
            num_dropped += 1
        model.append((number, may_drop))
    assert queue.num_dropped == num_dropped
    assert drain(queue) == [number for number, _ in model]


def test_what_must_not_be_lost_stays_while_there_is_something_else() -> None:
    queue = DroppingQueue[int](3)
    queue.put(1, droppable=False)
    for number in range(2, 50):
        queue.put(number, droppable=True)
    assert drain(queue) == [1, 48, 49]


def test_get_waits_for_an_item() -> None:
    queue, got = DroppingQueue[int](2), list[int | None]()
    thread = threading.Thread(target=lambda: got.append(queue.get()))
    thread.start()
    queue.put(7, droppable=True)
    thread.join(10)
    assert got == [7]


def test_closing_wakes_a_waiting_get_and_lets_nothing_more_in() -> None:
    queue, got = DroppingQueue[int](2), list[int | None]()
    thread = threading.Thread(target=lambda: got.append(queue.get()))
    thread.start()
    queue.close()
    thread.join(10)
    assert got == [None]
    queue.put(1, droppable=False)
    assert queue.get() is None


def test_a_failure_comes_before_what_waits_and_the_first_close_counts() -> None:
    queue = DroppingQueue[int](2)
    queue.put(1, droppable=True)
    queue.close(Unavailable("The end."))
    queue.close()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"The end\."):
            queue.get()
