"""The inbox keeps the newest hints in order, counts what it pushed out, and costs the engine thread next to nothing."""

import threading
import timeit
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from compute_node.hint_inbox import HintInbox, ReceivedHint
from promoe.hint import Hint


def received(step: int) -> ReceivedHint:
    return ReceivedHint(Hint(step, 0, 0, 0, np.array([1], np.uint16), np.array([1], np.float32), 1, "a@1"), None)


def steps(inbox: HintInbox) -> list[int]:
    return [item.hint.step for item in inbox.drain()]


@given(st.integers(1, 5), st.lists(st.integers(0, 7), max_size=8))
def test_what_is_drained_is_the_newest_of_what_was_put(capacity: int, bursts: list[int]) -> None:
    inbox = HintInbox(capacity)
    number = dropped = 0
    for burst in bursts:
        numbers = list(range(number, number + burst))
        number += burst
        for step in numbers:
            inbox.put(received(step))
        assert steps(inbox) == numbers[-capacity:]
        dropped += max(0, burst - capacity)
    assert inbox.num_overflowed == dropped


def test_two_threads_lose_nothing_uncounted() -> None:
    inbox = HintInbox(capacity=16)
    num_put = 20_000
    item = received(1)

    def fill() -> None:
        for _ in range(num_put):
            inbox.put(item)

    thread = threading.Thread(target=fill)
    thread.start()
    num_drained = 0
    while thread.is_alive():
        num_drained += len(inbox.drain())
    thread.join()
    num_drained += len(inbox.drain())
    assert num_drained + inbox.num_overflowed == num_put


def test_draining_an_empty_inbox_costs_less_than_a_microsecond() -> None:
    inbox = HintInbox()
    runs = 20_000
    assert min(timeit.repeat(inbox.drain, number=runs, repeat=5)) / runs < 1e-6


def test_scores_that_are_no_probabilities_are_made_some_by_who_drains() -> None:
    inbox = HintInbox()
    inbox.calibrate = lambda hint: replace(hint, scores=np.array([0.5], np.float32))
    inbox.put(received(1))
    inbox.put(replace(received(2), is_calibrated=False))
    assert [float(item.hint.scores[0]) for item in inbox.drain()] == [1.0, 0.5]
