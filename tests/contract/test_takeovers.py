"""Another predictor takes over over real sockets: the engine goes on, and what fails is left or never taken."""

import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch

from compute_node.device.cpu import CpuDevice
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.hint_link import HintLink
from compute_node.layer_observer import LayerObserver
from compute_node.miss_watch import MissLevel
from compute_node.takeovers import ITSELF, MOST_FAULTS, MOST_WAITING, WARM_UP_STEPS, Takeovers, TakeoverTimes
from promoe.errors import (
    InternalError,
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    Overloaded,
    PromoeError,
    Unavailable,
)
from promoe.hint import ObservedKind, PredictorVersion, StepSpan, StepStart
from promoe.node_report import PredictorSwitch
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import ENGINE_DEADLINE_S, HIDDEN, NUM_LAYERS, PATIENCE, SPEC, warnings_in
from tests.running_store import wait_until
from tests.scripted_predictor import Response, Script, ScriptedPredictor, good_hint, hints, welcome

TIMES = TakeoverTimes(handshake_s=20.0, idle_s=20.0, warm_up_s=20.0, drain_s=20.0, trial_s=60.0)
"""Long: what happens must be what happened, not that time was over."""

Outcome: TypeAlias = "Future[PredictorSwitch | None]"


class Engine:
    """An engine thread that never stops making steps, and the link that it watches."""

    def __init__(self, endpoint: str, times: TakeoverTimes = TIMES) -> None:
        self.inbox = HintInbox(100_000)
        self.misses = MissLevel.FEW
        self.link = HintLink(SPEC, self.inbox, PATIENCE, lambda: self.misses)
        self.takeovers = Takeovers(self.link, endpoint, times)
        self.observer = LayerObserver(NUM_LAYERS, CpuDevice(), self.link.samplers)
        self.step = 0
        self.longest_step_s = 0.0
        self.received: list[ReceivedHint] = []
        self._is_running = threading.Event()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def run(self) -> None:
        """Steps from now on."""
        self._is_running.set()

    def pause(self) -> None:
        """No more than the running one."""
        self._is_running.clear()

    def connect(self, endpoint: str) -> Outcome:
        return self.takeovers.connect(endpoint, "ann", "to see")

    def hints_of(self, name: str) -> list[ReceivedHint]:
        """Those that came so far."""
        return [received for received in list(self.received) if received.hint.version == name]

    def start(self) -> None:
        self.takeovers.start()
        self._thread.start()

    def end(self) -> None:
        self._ends.set()
        self._is_running.set()
        self._thread.join()
        self.takeovers.close()

    def _run(self) -> None:
        while self._is_running.wait() and not self._ends.is_set():
            began_s = time.perf_counter()
            self.make_step()
            self.longest_step_s = max(self.longest_step_s, time.perf_counter() - began_s)
            time.sleep(0.001)  # the services are threads of this process, too

    def is_connected(self) -> bool:
        incumbent = self.link.roles.incumbent
        return incumbent is not None and incumbent.client.active is not None

    def make_awaited_step(self) -> set[str]:
        """A step on the caller's thread that is over when all its hints have come; whose they are."""
        self.make_step()
        wanted = {(self.step, layer) for layer in range(1, NUM_LAYERS)}

        def came() -> bool:
            self.received += self.inbox.drain()
            return wanted <= {(received.hint.step, received.hint.layer) for received in self.received}

        wait_until(came)
        return {received.hint.version for received in self.received if received.hint.step == self.step}

    def make_step(self) -> None:
        """What the engine thread does for one."""
        self.step += 1
        self.observer.begin_step(StepStart(self.step, (StepSpan("r", 1, False),)))
        hidden_TD = torch.full((1, HIDDEN), float(self.step))
        for layer in range(NUM_LAYERS):
            self.observer.layer_input(layer, hidden_TD)
            self.received += self.inbox.drain()
            self.observer.routed(layer, np.full((1, 2), layer), hidden_TD)
        self.observer.last_output(hidden_TD)
        self.received += self.inbox.drain()


@contextmanager
def engine_at(endpoint: str, times: TakeoverTimes = TIMES) -> Iterator[Engine]:
    engine = Engine(endpoint, times)
    engine.start()
    try:
        yield engine
    finally:
        engine.end()
    assert engine.longest_step_s < ENGINE_DEADLINE_S, "the engine's thread waits for nobody"


def hints_as(name: str, **changes: object) -> Script:
    """Answers each observation with one hint that is named after the service."""

    def script(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion(name, "scripted", ObservedKind.LAYER_INPUT, (1,), True, True))
        for request in requests:
            if request.HasField("observation") and request.observation.layer < NUM_LAYERS - 1:
                hint = good_hint(request.observation, name)
                for field, value in changes.items():
                    hint.ClearField(field)  # type: ignore[arg-type]
                    hint.MergeFrom(pb.Hint(**{field: value}))  # type: ignore[arg-type]
                yield hints(hint)

    return script


class Services:
    """Scripted predictors at endpoints of their own, all over one transport."""

    def __init__(self, folder: Path, with_packets: bool) -> None:
        self._folder = folder
        self._make = functools.partial(ScriptedPredictor, spec=SPEC, with_packets=with_packets)
        self._open: list[ScriptedPredictor] = []

    def endpoint(self, name: str) -> str:
        return f"unix:{self._folder / name}"

    def serve(self, name: str, script: Script | None = None) -> ScriptedPredictor:
        service = self._make(self.endpoint(name), script=script or hints_as(name))
        self._open.append(service)
        return service.__enter__()

    def close(self) -> None:
        for service in self._open:
            service.kill()


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
        while not outcome.done() or len(makers) < 20:
            makers.append(engine.make_awaited_step())
        assert outcome.result() is not None
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
        assert len(new.observations()) >= WARM_UP_STEPS
        assert engine.received == []


# ---- what may not take over


def silent(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield from (b"" for _ in requests if False)


def welcomes_only(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield welcome()
    yield from (b"" for _ in requests if False)


def garbage(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield welcome()
    yield b"\xff\xff\xff"


def ends_at_once(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield from ()


def floods(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield welcome()
    for request in requests:
        if request.HasField("observation"):
            yield hints(*[good_hint(request.observation)] * 4000)


@pytest.mark.parametrize(
    ("script", "times", "error", "reason"),
    [
        (silent, replace(TIMES, handshake_s=0.3), ModelNotFound, "No handshake came about within 0.3 s"),
        (welcomes_only, replace(TIMES, warm_up_s=0.5), ModelNotFound, "gave no hint"),
        (garbage, TIMES, InternalError, "cannot be decoded"),
        (ends_at_once, TIMES, ModelNotFound, "ended the session"),
        (floods, TIMES, InternalError, "It sent more than"),
        (hints_as("new", experts=[9999] * 3), TIMES, InternalError, "of its hints made no sense"),
        (hints_as("new", version="another"), TIMES, InternalError, "of its hints made no sense"),
    ],
)
def test_who_fails_while_it_is_tried_out_does_not_take_over(
    services: Services, script: Script, times: TakeoverTimes, error: type[PromoeError], reason: str
) -> None:
    services.serve("old")
    new = services.serve("new", script)
    with engine_at(services.endpoint("old"), times) as engine:
        engine.run()
        wait_until(lambda: len(engine.hints_of("old")) > 10)
        with pytest.raises(error, match=reason) as refused:
            engine.connect(new.endpoint).result(20)
        assert f"the node stays with the one at {services.endpoint('old')}" in str(refused.value)
        assert engine.takeovers.endpoint == services.endpoint("old")
        assert (engine.takeovers.candidate, engine.takeovers.last_switch) == ("", None)
        num_hints = len(engine.hints_of("old"))
        wait_until(lambda: len(engine.hints_of("old")) > num_hints + 10)
        assert {received.hint.version for received in engine.received} == {"old"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda info: setattr(info.model, "fingerprint", "0" * 16), "0" * 16),
        (lambda info: setattr(info.service, "schema_version", "1.9"), "speaks schema 1.9"),
    ],
)
def test_another_model_or_schema_is_refused(
    services: Services, change: Callable[[pb.PredictorGetInfoResponse], None], reason: str
) -> None:
    services.serve("old")
    new = services.serve("new")
    change(new.info)
    with engine_at(services.endpoint("old")) as engine:
        with pytest.raises(ModelMismatch, match=reason):
            engine.connect(new.endpoint).result(20)
        assert new.num_sessions == 0


def test_nobody_there_and_somebody_else_are_refused(services: Services, socket_dir: Path) -> None:
    services.serve("old")
    with engine_at(services.endpoint("old")) as engine:
        with pytest.raises(ModelNotFound, match="No such file"):
            engine.connect(services.endpoint("nobody")).result(20)
        with speaker(socket_dir / "s", b"\0garbage" * 99), pytest.raises(PromoeError, match="cannot take over"):
            engine.connect(f"unix:{socket_dir / 's'}").result(20)
        with pytest.raises(InvalidInput, match="Nobody is named"):
            engine.takeovers.connect(services.endpoint("new"), "  ", "")
        assert engine.takeovers.endpoint == services.endpoint("old")


@contextmanager
def speaker(path: Path, speech: bytes) -> Iterator[None]:
    """Says the same to everybody who connects."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def speak() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(speech)

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


# ---- who fails on trial


@pytest.mark.parametrize("way", ["dies", "talks nonsense", "garbage"])
def test_who_fails_on_trial_is_left_for_the_one_before(
    services: Services, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    spoils = threading.Event()

    def turns_bad(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion("new", "scripted", ObservedKind.LAYER_INPUT, (1,), True, True))
        for request in requests:
            if request.HasField("observation") and request.observation.layer < NUM_LAYERS - 1:
                hint = good_hint(request.observation, "new")
                if spoils.is_set():
                    hint.layer = NUM_LAYERS + 1
                yield b"\xff\xff" if spoils.is_set() and way == "garbage" else hints(hint)

    services.serve("old")
    new = services.serve("new", turns_bad)
    with engine_at(services.endpoint("old")) as engine:
        engine.run()
        engine.connect(new.endpoint).result(20)
        wait_until(lambda: len(engine.hints_of("new")) > 10)
        spoils.set()
        if way == "dies":
            new.kill()
        wait_until(lambda: engine.takeovers.endpoint == services.endpoint("old"))
        switch = engine.takeovers.last_switch
        assert switch is not None
        assert (switch.is_return, switch.who, switch.before) == (True, ITSELF, new.endpoint)
        assert "failed on trial" in switch.why
        num_hints = len(engine.hints_of("old"))
        wait_until(lambda: len(engine.hints_of("old")) > num_hints + 10)
        assert engine.takeovers.previous == "", "who was good enough before is not on trial"
        if way == "talks nonsense":
            assert engine.link.traffic.invalid > MOST_FAULTS
    assert any("by the wish of the node itself" in message for message in warnings_in(caplog))


def test_who_fails_after_its_trial_is_looked_for_again(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    with engine_at(services.endpoint("old"), replace(TIMES, trial_s=0.001)) as engine:
        engine.run()
        engine.connect(new.endpoint).result(20)
        wait_until(lambda: engine.takeovers.previous == "")
        new.kill()
        wait_until(lambda: engine.link.traffic.observations_sent > 0 and engine.link.roles.incumbent is not None)
        num_hints = len(engine.hints_of("new"))
        services.serve("new")
        wait_until(lambda: len(engine.hints_of("new")) > num_hints + 10)
        assert engine.takeovers.endpoint == new.endpoint


def test_when_both_are_gone_whoever_comes_first_is_taken(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    old, new = services.serve("old"), services.serve("new")
    with engine_at(old.endpoint) as engine:
        engine.run()
        for survivor, other in (("new", "old"), ("old", "new")):
            engine.connect(services.endpoint("new")).result(20)
            old.kill()
            new.kill()
            wait_until(lambda: "cannot take over" in caplog.text)
            caplog.clear()
            num_hints = len(engine.hints_of(survivor))
            back = services.serve(survivor)
            wait_until(lambda: len(engine.hints_of(survivor)) > num_hints + 10)  # noqa: B023
            assert engine.takeovers.endpoint == services.endpoint(survivor)
            old, new = (services.serve(other), back) if survivor == "new" else (back, services.serve(other))


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
