"""What waits to be sent to a predictor: what gives way, and what does not."""

from hypothesis import given
from hypothesis import strategies as st

from compute_node.layer_sample import LayerSample
from compute_node.outgoing import QUEUE_CAPACITY, OutgoingEvent, OutgoingQueue
from promoe.hint import ObservedKind, RequestsEnded, StepStart


def sample(step: int, layer: int) -> LayerSample:
    return LayerSample(step, layer, ObservedKind.NONE, (0,), 1, None, ())


def drained(outgoing: OutgoingQueue) -> list[OutgoingEvent]:
    outgoing.end()
    return list(iter(outgoing.next_event, None))


events = st.lists(
    st.sampled_from(["step", "sample", "sample", "sample", "sample", "ended"]), min_size=0, max_size=3 * QUEUE_CAPACITY
)


@given(events)
def test_the_newest_are_kept_in_order_and_every_end_is_told(kinds: list[str]) -> None:
    outgoing = OutgoingQueue()
    sent: list[OutgoingEvent] = []
    for number, kind in enumerate(kinds):
        event: OutgoingEvent = sample(number, 0)
        if kind == "step":
            event = StepStart(number, ())
        elif kind == "ended":
            event = RequestsEnded((f"r{number}",))
        sent.append(event)
        outgoing.send(event)
    kept = drained(outgoing)
    assert len(kept) <= QUEUE_CAPACITY + 1
    told = [request_id for event in kept if isinstance(event, RequestsEnded) for request_id in event.request_ids]
    assert sorted(told) == sorted(i for event in sent if isinstance(event, RequestsEnded) for i in event.request_ids)
    others = [event for event in kept if not isinstance(event, RequestsEnded)]
    sent_others = [event for event in sent if not isinstance(event, RequestsEnded)]
    assert others == sent_others[len(sent_others) - len(others) :]
    samples_kept = sum(isinstance(event, LayerSample) for event in others)
    num_dropped = outgoing.num_dropped
    assert samples_kept + num_dropped == sum(isinstance(event, LayerSample) for event in sent)
    if len(sent) <= QUEUE_CAPACITY:
        assert num_dropped == 0
