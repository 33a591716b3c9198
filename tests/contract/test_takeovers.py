"""Another predictor takes over over real sockets: the engine goes on, and what fails is left or never taken."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from compute_node.miss_watch import MissLevel
from compute_node.takeovers import MOST_WAITING, WARM_UP_STEPS
from promoe.errors import (
    ModelNotFound,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.hint import ObservedKind, PredictorVersion
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import warnings_in
from tests.contract.takeover_engine import TIMES, Engine, Services, engine_at, hints_as, silent
from tests.running_store import wait_until
from tests.scripted_predictor import Response, welcome


@pytest.fixture(params=["grpc", "packets"])
def services(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[Services]:
    opened = Services(socket_dir, request.param == "packets")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compute_node")


def test_no_step_goes_without_hints_where_they_come_in_time(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    engine = Engine(services.endpoint("old"))
    engine.takeovers.start()
    try:
        wait_until(engine.is_connected)
        for _ in range(3):
            assert engine.make_awaited_step() == {"old"}
        outcome = engine.connect(new.endpoint)
        makers: list[set[str]] = []
        while not makers or "new" not in makers[-1]:
            makers.append(engine.make_awaited_step())
        makers += [engine.make_awaited_step() for _ in range(10)]
        assert outcome.result(20) is not None
        assert (makers[0], makers[-1]) == ({"old"}, {"new"})
        assert makers == sorted(makers, key=lambda names: "new" in names), "one after the other"
        assert set() not in makers, "nothing is lost"
    finally:
        engine.takeovers.close()


def test_a_new_service_takes_over_between_two_steps(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    with engine_at(services.endpoint("old")) as engine:
        engine.run()
        wait_until(lambda: len(engine.hints_of("old")) > 10)
        switch = engine.connect(new.endpoint).result(20)
        assert switch is not None
        assert (switch.before, switch.after) == (services.endpoint("old"), new.endpoint)
        assert (switch.who, switch.why, switch.is_return) == ("ann", "to see", False)
        wait_until(lambda: len(engine.hints_of("new")) > 10)
        assert engine.link.num_withheld >= WARM_UP_STEPS, "it was warm before it was listened to"
        assert engine.takeovers.previous == services.endpoint("old"), "for as long as the new one is on trial"
        wait_until(lambda: len(engine.link._books.connections) == 1)
        taken, come = len(engine.received), engine.link.traffic
        assert (come.invalid, come.wrong_version) == (0, 0)
        assert taken > 0


def test_the_old_one_may_die(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    old, new = services.serve("old"), services.serve("new")
    with engine_at(old.endpoint) as engine:
        engine.run()
        engine.connect(new.endpoint).result(20)
        num_sessions = old.num_sessions
        old.kill()
        wait_until(lambda: len(engine.hints_of("new")) > 50)
        assert engine.takeovers.endpoint == new.endpoint
        assert engine.takeovers.last_switch is not None
        assert not engine.takeovers.last_switch.is_return
        assert old.num_sessions == num_sessions
    assert warnings_in(caplog) == []


def test_an_endpoint_in_use_is_answered_at_once(services: Services) -> None:
    services.serve("old")
    with engine_at(services.endpoint("old")) as engine:
        assert engine.connect(services.endpoint("old")).result(20) is None
        assert engine.takeovers.last_switch is None


def test_on_an_idle_node_a_handshake_suffices(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    with engine_at(services.endpoint("old"), replace(TIMES, idle_s=0.0, drain_s=0.1)) as engine:
        assert engine.connect(new.endpoint).result(20) is not None
        engine.run()
        wait_until(lambda: len(engine.hints_of("new")) > 10)
        assert engine.hints_of("old") == []


def test_a_node_without_a_predictor_gets_one(services: Services) -> None:
    new = services.serve("new")
    with engine_at("") as engine:
        engine.run()
        switch = engine.connect(new.endpoint).result(20)
        assert switch is not None
        assert (switch.before, engine.takeovers.previous) == ("", "")
        wait_until(lambda: len(engine.hints_of("new")) > 10)


def test_a_version_that_gives_no_hints_is_shown_steps_only(services: Services) -> None:
    def mute(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion("none@1", "none", ObservedKind.NONE, (), True, False))
        yield from (b"" for _ in requests if False)

    services.serve("old")
    new = services.serve("new", mute)
    with engine_at(services.endpoint("old"), replace(TIMES, trial_s=0.0)) as engine:
        engine.run()
        assert engine.connect(new.endpoint).result(20) is not None
        assert engine.takeovers.previous == "", "there is no trial"


def test_who_is_tried_out_is_shown_something_even_if_nothing_is_missed(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    with engine_at(services.endpoint("old")) as engine:
        engine.misses = MissLevel.HARDLY_ANY
        engine.run()
        assert engine.connect(new.endpoint).result(20) is not None
        # From the switch on it is shown no more than its predecessor; what it was shown before it may answer late.
        last_shown = engine.step + 2
        wait_until(lambda: engine.step > last_shown + 20)
        steps = {observation.step for observation in new.observations()}
        assert len(steps) >= WARM_UP_STEPS
        assert max(steps) <= last_shown
        assert all(received.hint.observed_step <= last_shown for received in engine.received)


# ---- several who ask


def test_who_asks_while_another_takes_over_is_served_after_it(services: Services) -> None:
    go_on = threading.Event()

    def slow(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        go_on.wait(20)
        yield from hints_as("slow")(requests)

    services.serve("old")
    services.serve("slow", slow)
    services.serve("new")
    with engine_at(services.endpoint("old")) as engine:
        engine.run()
        outcomes = [engine.connect(services.endpoint(name)) for name in ("slow", "new", "new")]
        wait_until(lambda: engine.takeovers.candidate == services.endpoint("slow"))
        assert engine.takeovers.endpoint == services.endpoint("old")
        outcomes += [engine.connect(services.endpoint("nobody")) for _ in range(MOST_WAITING - 2)]
        with pytest.raises(Overloaded):
            engine.connect(services.endpoint("new"))
        assert outcomes[-1].cancel(), "who has gone is not served"
        go_on.set()
        switches = [outcome.result(20) for outcome in outcomes[:3]]
        assert [switch.after if switch else None for switch in switches] == [
            services.endpoint("slow"),
            services.endpoint("new"),
            None,
        ]
        assert isinstance(outcomes[3].exception(20), ModelNotFound)


def test_a_node_that_ends_refuses_who_waits(services: Services) -> None:
    services.serve("old")
    services.serve("mute", silent)
    with engine_at(services.endpoint("old")) as engine:
        outcomes = [engine.connect(services.endpoint("mute")) for _ in range(3)]
        wait_until(lambda: engine.takeovers.candidate != "")
    assert all(isinstance(outcome.exception(20), PromoeError) for outcome in outcomes)
    with pytest.raises(Unavailable):
        engine.connect(services.endpoint("new")).result(20)
