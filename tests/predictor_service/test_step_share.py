"""A part of a step is what the step would have been with these requests alone."""

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.step_share import StepShare
from promoe.hint import LayerRouting, Observation, StepSpan, StepStart

SPANS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def observed(start: StepStart, rows: tuple[int, ...]) -> Observation:
    """Of which every row's values are the row's number in the whole step."""
    numbers = np.array(rows)
    routing = LayerRouting(2, np.stack([numbers, numbers + 100], axis=1).astype(np.uint16), ready=(1, 5))
    hidden_RD = np.repeat(numbers[:, None], 3, axis=1).astype(np.float32)
    return Observation(start.step, 2, rows, start.num_tokens, hidden_RD, (routing,))


def step(lengths: list[int]) -> StepStart:
    return StepStart(7, tuple(StepSpan(f"r{index}", n, n > 1) for index, n in enumerate(lengths)), version="a@1")


def even(request_id: str) -> bool:
    return int(request_id[1:]) % 2 == 0


def odd(request_id: str) -> bool:
    return not even(request_id)


def test_without_a_choice_it_is_the_step_itself() -> None:
    start = step([1, 2])
    whole = observed(start, (0, 2))
    assert StepShare(start).start is start
    assert StepShare(start).of(whole) is whole
    assert StepShare(start, lambda _: True).of(whole) is whole


@given(SPANS, st.data())
def test_two_parts_have_every_row_once_and_in_order(lengths: list[int], data: st.DataObject) -> None:
    start = step(lengths)
    rows = tuple(sorted(data.draw(st.sets(st.integers(0, start.num_tokens - 1)))))
    whole = observed(start, rows)
    seen: list[int] = []
    for takes in (even, odd):
        share = StepShare(start, takes)
        assert [span.request_id for span in share.start.spans] == [
            s.request_id for s in start.spans if takes(s.request_id)
        ]
        assert (share.start.step, share.start.version) == (start.step, start.version)
        part = share.of(whole)
        expected = rows_alone(start, rows, takes)
        assert (part is None) == (not expected and share.start is not start)
        if part is None:
            continue
        assert part.hidden_RD is not None
        (routing,) = part.routings
        assert part.num_tokens == share.start.num_tokens
        assert list(part.rows) == [new for _, new in expected]
        assert part.hidden_RD[:, 0].tolist() == routing.topk_ids_RK[:, 0].tolist() == [old for old, _ in expected]
        assert routing.ready == (1, 5)
        seen += [old for old, _ in expected]
    assert sorted(seen) == list(rows)


def test_a_step_of_any_number_of_tokens_takes_no_more_memory() -> None:
    start = StepStart(1, (StepSpan("r0", (1 << 32) - 1, True), StepSpan("r1", 1, False)))
    share = StepShare(start, even)
    rows = (5, start.num_tokens - 1)
    part = share.of(Observation(1, 0, rows, start.num_tokens))
    assert part is not None
    assert (part.rows, part.num_tokens) == ((5,), (1 << 32) - 1)


def rows_alone(start: StepStart, rows: tuple[int, ...], takes: Callable[[str], bool]) -> list[tuple[int, int]]:
    """The oracle: of the chosen requests' sampled rows, the number in the whole step and among their own."""
    owners = [span.request_id for span in start.spans for _ in range(span.num_tokens)]
    mine = [row for row, owner in enumerate(owners) if takes(owner)]
    return [(row, mine.index(row)) for row in rows if row in mine]
