"""The predictor's client over real sockets: whatever the service does, the engine goes on, and it is counted."""

import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compute_node.hint_client import PredictorState
from compute_node.hint_session import HintTraffic
from compute_node.miss_watch import MissLevel
from compute_node.outgoing import QUEUE_CAPACITY
from promoe.hint import ObservedKind, PredictorVersion, StepSpan, StepStart
from promoe.hint_wire import decode_observation, decode_step_start
from promoe.v1 import predictor_pb2 as pb
from promoe.wire import SCHEMA_VERSION
from tests.contract.hint_node import HIDDEN, PATIENCE, SPEC, node_at, warnings_in
from tests.running_store import wait_until
from tests.scripted_predictor import (
    VERSION,
    Response,
    ScriptedPredictor,
    Serve,
    good_hint,
    hints,
    welcome,
)


@pytest.fixture
def endpoint(socket_dir: Path) -> str:
    return f"unix:{socket_dir / 'p.sock'}"


@pytest.fixture(params=["grpc", "packets"])
def serve(request: pytest.FixtureRequest, endpoint: str) -> Serve:
    """A scripted predictor that is talked to over a stream, or over a packet socket."""
    return functools.partial(ScriptedPredictor, endpoint, with_packets=request.param == "packets")


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compute_node")


# ---- a service that behaves


def test_observations_go_out_and_hints_come_in(endpoint: str, serve: Serve) -> None:
    with serve(spec=SPEC) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        assert node.client.active == VERSION
        node.run_step(num_tokens=3)
        node.run_step(ended=("gone",))
        wait_until(lambda: node.client.traffic.observations_sent == 10)
        wait_until(lambda: service.requests.qsize() == 14)
        requests = [service.requests.get() for _ in range(14)]
        names = [request.WhichOneof("event") for request in requests]
        expected = ["hello", "step_start", *["observation"] * 5, "requests_ended", "step_start", *["observation"] * 5]
        assert names == expected
        assert requests[0].hello.model.fingerprint == SPEC.fingerprint
        assert decode_step_start(requests[1].step_start) == StepStart(
            1, (StepSpan("r", 3, True),), version=VERSION.version
        )
        for layer, request in enumerate(requests[2:7]):
            seen = decode_observation(request.observation)
            assert (seen.step, seen.layer, seen.rows, seen.num_tokens) == (1, layer, (0, 1, 2), 3)
            assert seen.hidden_RD is not None
            np.testing.assert_array_equal(seen.hidden_RD, np.full((3, HIDDEN), 1.0 + layer, np.float32))
            assert [routing.layer for routing in seen.routings] == ([layer - 1] if layer else [])
        assert list(requests[7].requests_ended.request_ids) == ["gone"]
        node.run_until(lambda: len(node.received) >= 10)
        wait_until(lambda: node.client.traffic.observations_sent == 5 * node.step)
    visits = [(r.hint.step, r.hint.layer) for r in node.received[:10]]
    assert visits == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 0)]
    assert all(r.latency_s is not None and 0 < r.latency_s < 20 for r in node.received)
    assert node.client.traffic == HintTraffic(observations_sent=5 * node.step)


def test_rows_are_no_more_than_the_service_wants(endpoint: str, serve: Serve) -> None:
    def wants_two(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(max_rows=2)
        yield from (b"" for _ in requests if False)

    with serve(spec=SPEC, script=wants_two) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        node.run_step(num_tokens=9)
        wait_until(lambda: service.requests.qsize() == 7)
        assert {tuple(seen.rows) for seen in service.observations()} == {(7, 8)}


@pytest.mark.parametrize(
    ("kind", "wants_routing", "layers"),
    [
        (ObservedKind.ROUTER_INPUT, True, [(0, [0]), (1, [1]), (2, [2]), (3, [3])]),
        (ObservedKind.NONE, True, [(0, [0]), (1, [1]), (2, [2]), (3, [3])]),
        (ObservedKind.LAYER_INPUT, False, [(0, []), (1, []), (2, []), (3, []), (4, [])]),
        (ObservedKind.NONE, False, []),
    ],
)
def test_a_version_sees_what_it_asks_for(
    endpoint: str, serve: Serve, kind: ObservedKind, wants_routing: bool, layers: list[tuple[int, list[int]]]
) -> None:
    def asks(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion("a@1", "a", kind, (1,), True, wants_routing))
        yield from (b"" for _ in requests if False)

    with serve(spec=SPEC, script=asks) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        node.run_step()
        node.run_step()
        wait_until(lambda: service.requests.qsize() == 3 + 2 * len(layers))
        seen = service.observations()
        assert [(o.layer, [routing.layer for routing in o.routings]) for o in seen] == 2 * layers
        assert all(o.HasField("hidden") == (kind is not ObservedKind.NONE) for o in seen)


def test_more_is_shown_while_many_experts_are_missed_and_nothing_while_none_is(endpoint: str, serve: Serve) -> None:
    def asks(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome(PredictorVersion("a@1", "a", ObservedKind.ROUTER_INPUT, (1,), True, True, observe_every=2))
        yield from (b"" for _ in requests if False)

    expected: list[tuple[int, int, list[int]]] = []
    with serve(spec=SPEC, script=asks) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        for node.misses in (MissLevel.FEW, MissLevel.HARDLY_ANY, MissLevel.MANY, MissLevel.FEW):
            node.run_step(ended=(f"r{node.step}",))
            if node.misses is MissLevel.MANY:
                expected += [(node.step, layer, [layer]) for layer in range(4)]
            elif node.misses is MissLevel.FEW:
                expected += [(node.step, 0, [0]), (node.step, 2, [1, 2]), (node.step, 3, [3])]
        seen: list[tuple[int, int, list[int]]] = []
        ended: list[str] = []

        def all_came() -> bool:
            while not service.requests.empty():
                request = service.requests.get()
                ended.extend(request.requests_ended.request_ids)
                if request.HasField("step_start"):
                    assert request.step_start.version == "a@1"
                if request.HasField("observation"):
                    routed = [routing.layer for routing in request.observation.routings]
                    seen.append((request.observation.step, request.observation.layer, routed))
            return len(seen) == len(expected)

        wait_until(all_came)
        assert seen == expected
        assert ended == ["r0", "r1", "r2", "r3"], "who has left is told, whatever is shown"


def test_a_new_version_takes_over_between_two_steps(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    second = PredictorVersion("scripted@2", "scripted", ObservedKind.ROUTER_INPUT, (1,), True, False)
    third = PredictorVersion("scripted@3", "scripted", ObservedKind.LAYER_INPUT, (1,), True, False)
    versions = iter((second, third))

    def upgrades(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        for request in requests:
            if request.HasField("step_start") and request.step_start.step in (2, 3):
                yield welcome(next(versions))
            elif request.HasField("observation") and request.observation.layer == 0:
                yield hints(
                    good_hint(request.observation, "scripted@1"),
                    good_hint(request.observation, "scripted@2"),
                    good_hint(request.observation, "scripted@3"),
                )

    with serve(spec=SPEC, script=upgrades) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        for step, active in ((1, VERSION), (2, second), (3, third)):
            node.run_step()
            node.wait_for(lambda active=active: node.client.active == active)  # type: ignore[misc]
            node.wait_for(lambda step=step: node.client.traffic.wrong_version + len(node.inbox._waiting) == 3 * step)  # type: ignore[misc]
        assert service.num_sessions == 1
    # Each version and the one before it.
    taken = [(r.hint.step, r.hint.version[-1]) for r in node.inbox.drain()]
    assert taken == [(1, "1"), (2, "1"), (2, "2"), (3, "2"), (3, "3")]
    assert sum("version is" in message for message in caplog.messages) == 2


# ---- a service that is not there


def test_nobody_there_is_said_once_and_asked_for_again(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    with node_at(endpoint) as node:
        for _ in range(200):
            node.run_step()
        node.run_until(lambda: bool(warnings_in(caplog)))
        assert node.client.traffic == HintTraffic()
        with serve(spec=SPEC):
            node.run_until(lambda: bool(node.received))
            assert ["No such file" in message for message in warnings_in(caplog)] == [True]


def test_killed_and_restarted_predictors_are_found_again(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as services:
        service = services.enter_context(serve(spec=SPEC))
        with node_at(endpoint) as node:
            for _ in range(3):
                node.received.clear()
                node.run_until(lambda: len(node.received) > 20)
                num_sent = node.client.traffic.observations_sent
                service.kill()
                node.run_until(lambda: not node.is_connected)
                assert node.client.active is None
                assert node.client.traffic.observations_sent >= num_sent
                service = services.enter_context(serve(spec=SPEC))
    assert ["is away" in message for message in warnings_in(caplog)] == [True] * 3
    assert 3 <= sum("Connected to the predictor" in message for message in caplog.messages) <= 4


def test_a_service_that_never_welcomes_gets_no_observations(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()

    def silent(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        stop.wait(30)
        yield welcome()

    patience = replace(PATIENCE, welcome_s=0.2)
    with serve(spec=SPEC, script=silent) as service, node_at(endpoint, patience) as node:
        node.run_until(lambda: service.num_sessions >= 3)
        stop.set()
        assert service.observations() == []
        assert node.client.traffic == HintTraffic()
    assert [message for message in warnings_in(caplog) if "No welcome came" in message] == warnings_in(caplog)[:1]
    assert len(warnings_in(caplog)) == 1


def test_who_listens_and_says_nothing_does_not_hold_the_node_up(endpoint: str, serve: Serve) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(endpoint.removeprefix("unix:"))
        listener.listen()
        with node_at(endpoint) as node:
            connection, _ = listener.accept()
            with connection:
                node.run_step()
                assert node.client.state is PredictorState.AWAY
                node.client.close()


def test_a_service_that_stops_reading_costs_observations_only(endpoint: str, serve: Serve) -> None:
    go_on = threading.Event()

    def stopped(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        go_on.wait(30)
        for request in requests:
            if request.HasField("observation"):
                yield hints(good_hint(request.observation))

    wide = 8
    with serve(spec=SPEC, script=stopped) as service, node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        for _ in range(1000):
            node.run_step(num_tokens=wide, ended=(f"r{node.step}",))
        traffic = node.client.traffic
        assert node.is_connected
        assert traffic.observations_dropped > 0
        # What is in neither is waiting.
        assert 5000 - QUEUE_CAPACITY <= traffic.observations_sent + traffic.observations_dropped <= 5000
        go_on.set()
        last = node.step
        node.run_until(lambda: any(r.hint.step > last for r in node.received))
        told: list[str] = []

        def all_are_told() -> bool:
            while not service.requests.empty():
                told.extend(service.requests.get().requests_ended.request_ids)
            return len(told) >= 1000

        node.run_until(all_are_told)
    assert sorted(told) == sorted(f"r{step}" for step in range(1000)), "ends are told, however late"


# ---- a service for somebody else


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda info: setattr(info.model, "fingerprint", "0" * 16), ("f" * 16, "0" * 16)),
        (
            lambda info: setattr(info.service, "schema_version", "99.0"),
            ("speaks schema 99.0", f"speaks {SCHEMA_VERSION}"),
        ),
    ],
)
def test_a_predictor_for_another_model_or_schema_is_refused_with_both_sides(
    endpoint: str,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[pb.PredictorGetInfoResponse], None],
    reasons: tuple[str, str],
) -> None:
    with node_at(endpoint) as node:
        stranger = serve(spec=SPEC)
        change(stranger.info)
        with stranger:
            node.run_until(lambda: any(reasons[0] in message for message in warnings_in(caplog)))
            assert not node.is_connected
            assert stranger.num_sessions == 0
        said = [message for message in warnings_in(caplog) if reasons[0] in message]
        assert len(said) == 1
        assert reasons[1] in said[0]
        with serve(spec=SPEC):
            node.run_until(lambda: bool(node.received))


# ---- over packets only


def test_closing_before_the_welcome_is_an_orderly_end(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()

    def silent(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        stop.wait(30)
        yield welcome()

    with ScriptedPredictor(endpoint, SPEC, silent, with_packets=True) as service:
        with node_at(endpoint) as node:
            wait_until(lambda: service.num_sessions == 1)
            node.client.close()
            assert node.client.state is PredictorState.AWAY
        stop.set()
    assert warnings_in(caplog) == []


def test_a_service_that_neither_reads_nor_speaks_is_given_up(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()

    def stopped(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        stop.wait(30)

    patience = replace(PATIENCE, settled_s=0.01, silence_s=0.05)
    with ScriptedPredictor(endpoint, SPEC, stopped, with_packets=True), node_at(endpoint, patience) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        node.run_until(lambda: "neither read nor said anything" in caplog.text)
        assert node.client.traffic.observations_dropped > 0
        stop.set()


def test_a_socket_that_cannot_be_reached_leaves_the_stream(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedPredictor(endpoint, SPEC) as service:
        service.info.packets = True  # as it looks from another container
        with node_at(endpoint) as node:
            node.run_until(lambda: bool(node.received))
    assert "talked to over gRPC" in caplog.text
