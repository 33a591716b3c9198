"""A session's credit, versions and counters, without a socket: who is believed, and who is sent away."""

import logging

import pytest

from compute_node.hint_session import (
    FREE_HINTS,
    HINTS_PER_OBSERVATION,
    MAX_ROWS,
    MOST_CREDIT,
    HintSession,
    HintTraffic,
)
from compute_node.outgoing import QUEUE_CAPACITY, OutgoingQueue
from promoe.errors import Overloaded
from promoe.hint import ObservedKind, PredictorVersion
from promoe.trace_events import HintFate

NUM_LAYERS = 3


def version(name: str) -> PredictorVersion:
    return PredictorVersion(name, "a", ObservedKind.NONE, (1,), True, True)


def new_session() -> tuple[HintSession, OutgoingQueue]:
    outgoing = OutgoingQueue()
    return HintSession(NUM_LAYERS, outgoing), outgoing


def test_a_service_may_say_as_much_as_it_is_asked_for() -> None:
    session, _ = new_session()
    session.charge(FREE_HINTS)
    with pytest.raises(Overloaded, match="left alone"):
        session.charge(1)
    polite, outgoing = new_session()
    for _ in range(3 * FREE_HINTS):
        outgoing.num_sent += 1
        polite.charge(HINTS_PER_OBSERVATION)


def test_credit_is_not_saved_up_for_ever() -> None:
    session, outgoing = new_session()
    outgoing.num_sent = 10**6
    session.charge(0)
    session.charge(MOST_CREDIT)
    with pytest.raises(Overloaded):
        session.charge(1)


def test_latency_is_known_for_what_was_handed_over_lately() -> None:
    session, _ = new_session()
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
    session, _ = new_session()
    session.welcome(version("a@1"), wanted)
    assert session.max_rows == expected


def test_the_version_before_is_believed_until_the_next(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compute_node")
    session, _ = new_session()
    for name in ("a@1", "a@2", "a@3"):
        session.welcome(version(name), 1)
        assert session.active == version(name)
    assert set(session.announced) == {"a@2", "a@3"}
    assert len(caplog.messages) == 2


def test_refusals_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    session, _ = new_session()
    for _ in range(3):
        session.refuse(HintFate.INVALID, "an expert twice")
    session.refuse(HintFate.WRONG_VERSION, "b@9")
    before = HintTraffic(observations_sent=10, invalid=1)
    assert session.add_to(before) == HintTraffic(observations_sent=10, invalid=4, wrong_version=1)
    assert len(caplog.messages) == 2


def test_a_canary_s_hints_are_taken_while_it_is_announced_and_one_welcome_longer() -> None:
    session, _ = new_session()
    session.welcome(version("a@1"), 4, version("c@1"))
    assert set(session.announced) == {"a@1", "c@1"}
    session.welcome(version("a@1"), 4)
    assert set(session.announced) == {"a@1", "c@1"}, "hints may be under way"
    session.welcome(version("a@1"), 4)
    assert set(session.announced) == {"a@1"}
    assert session.canary is None
