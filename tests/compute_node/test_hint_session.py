"""A session's queue and credit, without a socket: what gives way, what does not, and who is sent away."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.hint_session import (
    FREE_HINTS,
    HINTS_PER_OBSERVATION,
    MAX_ROWS,
    MOST_CREDIT,
    QUEUE_CAPACITY,
    HintSession,
    HintTraffic,
    OutgoingEvent,
)
from compute_node.layer_sample import LayerSample
from promoe.errors import Overloaded
from promoe.hint import ObservedKind, PredictorVersion, RequestsEnded, StepStart
from promoe.trace_events import HintFate

NUM_LAYERS = 3


def sample(step: int, layer: int) -> LayerSample:
    return LayerSample(step, layer, ObservedKind.NONE, (0,), 1, None, ())


def version(name: str) -> PredictorVersion:
    return PredictorVersion(name, "a", ObservedKind.NONE, (1,), True, True)


def drained(session: HintSession) -> list[OutgoingEvent]:
    session.end()
    return list(iter(session.next_event, None))


events = st.lists(
    st.sampled_from(["step", "sample", "sample", "sample", "sample", "ended"]), min_size=0, max_size=3 * QUEUE_CAPACITY
)


@given(events)
def test_the_newest_are_kept_in_order_and_every_end_is_told(kinds: list[str]) -> None:
    session = HintSession(NUM_LAYERS)
    sent: list[OutgoingEvent] = []
    for number, kind in enumerate(kinds):
        event: OutgoingEvent = sample(number, 0)
        if kind == "step":
            event = StepStart(number, ())
        elif kind == "ended":
            event = RequestsEnded((f"r{number}",))
        sent.append(event)
        session.send(event)
    kept = drained(session)
    assert len(kept) <= QUEUE_CAPACITY + 1
    told = [request_id for event in kept if isinstance(event, RequestsEnded) for request_id in event.request_ids]
    assert sorted(told) == sorted(i for event in sent if isinstance(event, RequestsEnded) for i in event.request_ids)
    others = [event for event in kept if not isinstance(event, RequestsEnded)]
    sent_others = [event for event in sent if not isinstance(event, RequestsEnded)]
    assert others == sent_others[len(sent_others) - len(others) :]
    samples_kept = sum(isinstance(event, LayerSample) for event in others)
    num_dropped = session.add_to(HintTraffic()).observations_dropped
    assert samples_kept + num_dropped == sum(isinstance(event, LayerSample) for event in sent)
    if len(sent) <= QUEUE_CAPACITY:
        assert num_dropped == 0


def test_a_service_may_say_as_much_as_it_is_asked_for() -> None:
    session = HintSession(NUM_LAYERS)
    session.charge(FREE_HINTS)
    with pytest.raises(Overloaded, match="left alone"):
        session.charge(1)
    polite = HintSession(NUM_LAYERS)
    for _ in range(3 * FREE_HINTS):
        polite.num_sent += 1
        polite.charge(HINTS_PER_OBSERVATION)


def test_credit_is_not_saved_up_for_ever() -> None:
    session = HintSession(NUM_LAYERS)
    session.num_sent = 10**6
    session.charge(0)
    session.charge(MOST_CREDIT)
    with pytest.raises(Overloaded):
        session.charge(1)


def test_latency_is_known_for_what_was_handed_over_lately() -> None:
    session = HintSession(NUM_LAYERS)
    session.note_time(5, 2)
    latency_s = session.latency_s(5, 2)
    assert latency_s is not None
    assert 0 <= latency_s < 10
    assert session.latency_s(5, 1) is None
    assert session.latency_s(6, 2) is None
    for step in range(6, 6 + QUEUE_CAPACITY):
        for layer in range(NUM_LAYERS + 1):
            session.note_time(step, layer)
    assert session.latency_s(5, 2) is None, "forgotten, not confused with a later one"


@pytest.mark.parametrize(("wanted", "expected"), [(3, 3), (MAX_ROWS + 5, MAX_ROWS)])
def test_rows_are_the_smaller_of_both_wishes(wanted: int, expected: int) -> None:
    session = HintSession(NUM_LAYERS)
    session.welcome(version("a@1"), wanted)
    assert session.max_rows == expected


def test_the_version_before_is_believed_until_the_next(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compute_node")
    session = HintSession(NUM_LAYERS)
    for name in ("a@1", "a@2", "a@3"):
        session.welcome(version(name), 1)
        assert session.active == version(name)
    assert set(session.announced) == {"a@2", "a@3"}
    assert len(caplog.messages) == 2


def test_refusals_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    session = HintSession(NUM_LAYERS)
    for _ in range(3):
        session.refuse(HintFate.INVALID, "an expert twice")
    session.refuse(HintFate.WRONG_VERSION, "b@9")
    before = HintTraffic(observations_sent=10, invalid=1)
    assert session.add_to(before) == HintTraffic(observations_sent=10, invalid=4, wrong_version=1)
    assert len(caplog.messages) == 2
