"""A predictor that fails while it is tried out never takes over; one that fails on trial is left again."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from compute_node.predictor_trial import MOST_FAULTS, TakeoverTimes
from compute_node.takeovers import ITSELF, TakeoverCounts
from promoe.errors import (
    InternalError,
    InvalidInput,
    ModelMismatch,
    ModelNotFound,
    PromoeError,
)
from promoe.hint import ObservedKind, PredictorVersion
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import NUM_LAYERS, warnings_in
from tests.contract.takeover_engine import TIMES, Services, engine_at, hints_as, silent
from tests.running_store import wait_until
from tests.scripted_predictor import Response, Script, good_hint, hints, welcome


@pytest.fixture(params=["grpc", "packets"])
def services(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[Services]:
    opened = Services(socket_dir, request.param == "packets")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compute_node")


# ---- what may not take over


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
        assert engine.takeovers.counts == TakeoverCounts(refused=1)
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
        assert engine.takeovers.counts == TakeoverCounts(switched=1, returned=1)
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


def test_who_falls_silent_on_trial_is_left_for_the_one_before(services: Services) -> None:
    is_stopped, ends = threading.Event(), threading.Event()

    def stops(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        for response in hints_as("new")(requests):
            yield response
            if is_stopped.is_set():
                ends.wait(30)

    services.serve("old")
    new = services.serve("new", stops)
    with engine_at(services.endpoint("old"), replace(TIMES, silence_s=0.2)) as engine:
        engine.run()
        engine.connect(new.endpoint).result(20)
        wait_until(lambda: len(engine.hints_of("new")) > 10)
        is_stopped.set()
        wait_until(lambda: engine.takeovers.endpoint == services.endpoint("old"))
        switch = engine.takeovers.last_switch
        assert switch is not None
        assert (switch.is_return, "gave no hint" in switch.why) == (True, True)
        ends.set()


def test_on_an_idle_node_silence_is_no_failure_and_the_trial_goes_on(services: Services) -> None:
    services.serve("old")
    new = services.serve("new")
    times = replace(TIMES, idle_s=0.0, drain_s=0.01, silence_s=0.01, trial_s=0.01)
    with engine_at(services.endpoint("old"), times) as engine:
        engine.connect(new.endpoint).result(20)
        trial = engine.takeovers._trial
        assert trial is not None
        wait_until(lambda: time.perf_counter() - trial._began_s > 0.1)
        assert (trial.failure(), trial.is_passed()) == (None, False)
        engine.run()
        wait_until(lambda: engine.takeovers.previous == "")
        assert engine.takeovers.endpoint == new.endpoint


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
            failed = engine.link.roles.incumbent
            assert failed is not None
            tried_often = failed.client.num_failures + 5
            wait_until(lambda: failed.client.num_failures > tried_often)  # noqa: B023
            assert caplog.text.count("cannot take over") == 1, "it is tried again and again, and said once"
            assert f"at {old.endpoint} is away" not in caplog.text, "who tries it out has said so"
            caplog.clear()
            num_hints = len(engine.hints_of(survivor))
            back = services.serve(survivor)
            wait_until(lambda: len(engine.hints_of(survivor)) > num_hints + 10)  # noqa: B023
            assert engine.takeovers.endpoint == services.endpoint(survivor)
            old, new = (services.serve(other), back) if survivor == "new" else (back, services.serve(other))
