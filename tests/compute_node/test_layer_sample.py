"""Which tokens stand for a step."""

from hypothesis import given
from hypothesis import strategies as st

from compute_node.layer_sample import sampled_rows
from promoe.hint import StepSpan

span_lists = st.lists(
    st.tuples(st.integers(1, 6), st.booleans()).map(lambda drawn: StepSpan("r", drawn[0] if drawn[1] else 1, drawn[1])),
    max_size=6,
)


def rows_by_span(spans: list[StepSpan]) -> list[range]:
    ends = [sum(span.num_tokens for span in spans[: index + 1]) for index in range(len(spans))]
    return [range(end - span.num_tokens, end) for span, end in zip(spans, ends, strict=True)]


@given(spans=span_lists, max_rows=st.integers(1, 12))
def test_decode_rows_come_first_then_the_ends_of_the_prompts(spans: list[StepSpan], max_rows: int) -> None:
    rows = sampled_rows(spans, max_rows)
    num_tokens = sum(span.num_tokens for span in spans)
    assert list(rows) == sorted(set(rows))
    assert len(rows) == min(max_rows, num_tokens)
    assert all(0 <= row < num_tokens for row in rows)
    places = list(zip(spans, rows_by_span(spans), strict=True))
    decode_rows = [row for span, of_span in places for row in of_span if not span.is_prefill]
    taken_decode = [row for row in rows if row in decode_rows]
    assert taken_decode == decode_rows[:max_rows]
    # Of each prompt a tail, and no prompt's is two longer than another's that had more to give.
    tails = []
    for span, of_span in places:
        if span.is_prefill:
            taken = [row for row in rows if row in of_span]
            assert taken == list(of_span)[len(of_span) - len(taken) :]
            tails.append((len(taken), len(of_span)))
    assert all(one <= other + 1 or other == whole for one, _ in tails for other, whole in tails)


def test_a_step_without_tokens_has_no_rows() -> None:
    assert sampled_rows([], 4) == ()
