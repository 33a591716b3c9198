"""A predictor that talks nonsense costs its hints: dropped, counted, said once; what makes sense is taken."""

import functools
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_node.hint_client import PredictorState
from compute_node.hint_session import FREE_HINTS
from promoe.packet_channel import LARGEST_PACKET_NBYTES
from promoe.v1 import predictor_pb2 as pb
from tests.contract.hint_node import NUM_EXPERTS, NUM_LAYERS, SPEC, node_at, warnings_in
from tests.scripted_predictor import (
    VERSION,
    Response,
    Script,
    ScriptedPredictor,
    Serve,
    good_hint,
    hints,
    one_hint_each,
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


def nonsense(observation: pb.Observation) -> dict[str, pb.Hint]:
    def damaged(**fields: object) -> pb.Hint:
        hint = good_hint(observation)
        for name, value in fields.items():
            hint.ClearField(name)  # type: ignore[arg-type]
            hint.MergeFrom(pb.Hint(**{name: value}))  # type: ignore[arg-type]
        return hint

    return {
        "layer out of range": damaged(layer=NUM_LAYERS),
        "layer far out of range": damaged(layer=2**32 - 1),
        "expert out of range": damaged(experts=[1, 2, NUM_EXPERTS]),
        "expert beyond 16 bits": damaged(experts=[1, 2, 2**20]),
        "an expert twice": damaged(experts=[1, 2, 1]),
        "NaN": damaged(scores=[0.9, float("nan"), 0.1]),
        "infinite": damaged(scores=[float("inf"), 0.5, 0.1]),
        "infinite twice": damaged(scores=[float("inf"), float("-inf"), 0.1]),
        "no probability": damaged(scores=[1.5, 0.5, 0.1]),
        "negative": damaged(scores=[0.5, 0.2, -0.1]),
        "more experts than scores": damaged(scores=[0.5]),
        "more scores than experts": damaged(experts=[]),
        "too many expected": damaged(num_expected=NUM_EXPERTS + 1),
    }


NONSENSE = list(nonsense(pb.Observation()))


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_dropped_counted_and_said_once(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def garbage(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        for request in requests:
            if request.HasField("observation") and request.observation.layer < NUM_LAYERS - 1:
                yield hints(nonsense(request.observation)[name], good_hint(request.observation))

    with serve(spec=SPEC, script=garbage), node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        for _ in range(5):
            node.run_step()
        node.wait_for(lambda: node.client.traffic.invalid == 15)
        node.run_until(lambda: len(node.received) >= 15)
    assert all(r.hint.experts.tolist() == [3, 1, 2] for r in node.received)
    assert len(warnings_in(caplog)) == 1
    assert "A hint is dropped (invalid)" in warnings_in(caplog)[0]


def test_hints_of_a_version_that_was_not_announced_are_dropped(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def impostor(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        for request in requests:
            if request.HasField("observation"):
                yield hints(good_hint(request.observation, "another@9"))

    with serve(spec=SPEC, script=impostor), node_at(endpoint) as node:
        node.run_until(lambda: node.client.traffic.wrong_version >= 20)
    assert node.received == []
    assert (node.inbox.drain(), node.client.traffic.invalid) == ([], 0)
    assert len(warnings_in(caplog)) == 1
    assert "wrong_version" in warnings_in(caplog)[0]


def test_a_million_hints_a_second_end_the_session(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    message = hints(*[good_hint(pb.Observation(step=1, layer=0))] * 64).SerializeToString()

    def flood(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        yield from itertools.repeat(message)

    with serve(spec=SPEC, script=flood) as service, node_at(endpoint) as node:
        node.wait_for(lambda: service.num_sessions >= 4)
        node.run_step()
        num_came = len(node.inbox.drain())
        assert 0 < num_came <= service.num_sessions * FREE_HINTS
    # Said once, although it floods whenever it is let in again.
    assert len(warnings_in(caplog)) == 1
    assert "It sent more than" in warnings_in(caplog)[0]


def test_one_enormous_message_is_a_flood(endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    message = hints(*[pb.Hint(version=VERSION.version)] * (FREE_HINTS + 1))

    def flood(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        yield message

    with serve(spec=SPEC, script=flood), node_at(endpoint) as node:
        node.run_until(lambda: bool(warnings_in(caplog)))
    assert node.received == []
    assert "It sent more than" in warnings_in(caplog)[0]


def bytes_instead(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    next(requests)
    yield welcome()
    yield b"\xff\xff\xff\xff"


def bytes_at_once(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    yield b"\x0a\xff"


def unknown_kind(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    message = welcome()
    message.welcome.active.observed = pb.OBSERVED_KIND_UNSPECIFIED
    yield message


def no_rows(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    yield welcome(max_rows=0)


def another_schema(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    message = welcome()
    message.welcome.service.schema_version = "99.0"
    yield message


def ends_at_once(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
    yield from ()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (bytes_instead, "cannot be decoded"),
        (bytes_at_once, "cannot be decoded"),
        (unknown_kind, "welcome cannot be understood"),
        (no_rows, "wants no rows"),
        (another_schema, "speaks schema 99.0"),
        (ends_at_once, "ended the session"),
    ],
)
def test_a_stream_that_makes_no_sense_is_ended_and_said_once(
    endpoint: str, serve: Serve, caplog: pytest.LogCaptureFixture, script: Script, reason: str
) -> None:
    with serve(spec=SPEC, script=script) as service, node_at(endpoint) as node:
        node.run_until(lambda: service.num_sessions >= 4)
    assert [reason in message for message in warnings_in(caplog)] == [True]
    assert node.received == []


@pytest.mark.parametrize(("with_packets", "nbytes"), [(False, 2 << 20), (True, LARGEST_PACKET_NBYTES + 1)])
def test_a_message_that_is_too_large_ends_the_session(
    endpoint: str, caplog: pytest.LogCaptureFixture, with_packets: bool, nbytes: int
) -> None:
    def too_large(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        next(requests)
        yield welcome()
        yield bytes(nbytes)
        yield from (b"" for _ in requests if False)

    with ScriptedPredictor(endpoint, SPEC, too_large, with_packets) as service, node_at(endpoint) as node:
        node.run_until(lambda: service.num_sessions >= 4)
    assert ["too large" in message for message in warnings_in(caplog)] == [True]


def test_hints_before_the_welcome_are_nobodys(endpoint: str, serve: Serve) -> None:
    def eager(requests: Iterator[pb.PredictRequest]) -> Iterator[Response]:
        yield hints(good_hint(pb.Observation(step=1)))
        yield from one_hint_each(requests)

    with serve(spec=SPEC, script=eager), node_at(endpoint) as node:
        node.wait_for_state(PredictorState.CONNECTED)
        assert node.inbox.drain() == []
        assert node.client.traffic.wrong_version == 1
