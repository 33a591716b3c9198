"""A candidate's session beside each of the service's, from packets of which some are missing."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from predictor_service.feed import Overheard
from predictor_service.shadow.feed_client import MOST_SESSIONS, Listener, read_packet
from predictor_service.shadow.tally import ScoreReport
from promoe.errors import InvalidInput
from promoe.hint import Hint, LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from promoe.hint_wire import encode_hint, encode_observation, encode_step_start
from promoe.model_spec import Dtype
from promoe.v1 import predictor_pb2 as pb
from tests.predictor_service.test_versions import NamedPredictor


class Foreseeing(NamedPredictor):
    """Hints experts 1 and 2 for the layer after the observed one."""

    def observe(self, observation: Observation) -> Sequence[Hint]:
        return [hint_of("s@1", observation, [1, 2])]


def hint_of(version: str, observation: Observation, experts: list[int]) -> Hint:
    step, layer = observation.step, observation.layer
    scores = np.full(len(experts), 0.5, np.float32)
    return Hint(step, layer + 1, step, layer, np.array(experts, np.uint16), scores, len(experts), version)


def begin(step: int, session: int = 1) -> bytes:
    start = StepStart(step, (StepSpan("r1", 1, is_prefill=False),), version="a@1")
    return Overheard(session, pb.PredictRequest(step_start=encode_step_start(start)).SerializeToString()).encode()


def observe(
    step: int, layer: int, hinted: list[int], hidden: bool = True, session: int = 1, value: float = 0.0
) -> bytes:
    hidden_RD = np.full((1, 4), value, np.float32) if hidden else None
    routing = LayerRouting(layer, np.array([[1, 2]], np.uint16), ready=(2,))
    observation = Observation(step, layer, (0,), 1, hidden_RD, (routing,))
    said = pb.PredictRequest(observation=encode_observation(observation, Dtype.FLOAT32))
    answer = pb.PredictResponse(hints=pb.Hints(hints=[encode_hint(hint_of("a@1", observation, hinted))]))
    return Overheard(session, said.SerializeToString(), answer.SerializeToString()).encode()


def test_both_sides_are_scored_and_told_once() -> None:
    listener = Listener(Foreseeing("s@1"))
    for step in (1, 2):
        listener.hear(read_packet(begin(step)))
        for layer in range(3):
            listener.hear(read_packet(observe(step, layer, [2, 3])))
    listener.hear(read_packet(begin(3)))
    report = listener.report()
    active, shadow = report.tallies["a@1"], report.tallies["s@1"]
    assert (active.steps, active.layers, active.found, active.routed, active.ready) == (2, 4, 4, 8, 4)
    assert (shadow.steps, shadow.found, shadow.routed, shadow.observations) == (2, 8, 8, 6)
    assert [(one.active_score, one.shadow_score) for one in report.comparisons] == [(0.5, 1.0)] * 2
    assert listener.report().comparisons == ()
    assert listener.report().tallies["a@1"].steps == 2, "counts go on"


def test_a_report_is_read_back_as_it_was() -> None:
    listener = Listener(Foreseeing("s@1"))
    for step in (1, 2):
        listener.hear(read_packet(begin(step)))
        for layer in range(3):
            listener.hear(read_packet(observe(step, layer, [2, 3])))
    report = listener.report()
    assert ScoreReport.decode(json.loads(json.dumps(report.encode()))) == report
    wrongs: list[dict[str, object]] = [
        {},
        {"tallies": [], "comparisons": [], "ended": []},
        {"tallies": {}, "comparisons": [{}], "ended": []},
        {"tallies": {}, "comparisons": [], "ended": "r1"},
    ]
    for wrong in wrongs:
        with pytest.raises((ValueError, KeyError)):
            ScoreReport.decode(wrong)


def test_without_hidden_states_a_candidate_that_reads_them_says_nothing() -> None:
    listener = Listener(Foreseeing("s@1", ObservedKind.ROUTER_INPUT))
    listener.hear(read_packet(begin(1)))
    listener.hear(read_packet(observe(1, 0, [1, 2], hidden=False)))
    listener.hear(read_packet(observe(1, 1, [1, 2], hidden=False)))
    assert "s@1" not in listener.report().tallies or listener.report().tallies["s@1"].hinted == 0


def test_hidden_states_that_are_no_numbers_are_not_shown_to_a_candidate() -> None:
    listener = Listener(Foreseeing("s@1", ObservedKind.ROUTER_INPUT))
    listener.hear(read_packet(begin(1)))
    listener.hear(read_packet(observe(1, 0, [], value=float("nan"))))
    assert "s@1" not in listener.report().tallies
    listener.hear(read_packet(observe(1, 1, [])))
    assert listener.report().tallies["s@1"].observations == 1


def test_what_follows_on_a_step_that_was_not_heard_is_left_out() -> None:
    listener = Listener(Foreseeing("s@1"))
    listener.hear(read_packet(observe(4, 0, [1, 2])))
    listener.hear(read_packet(begin(5)))
    listener.hear(read_packet(observe(4, 1, [1, 2])))
    listener.hear(read_packet(begin(9)))
    assert listener.report().comparisons == ()


def test_alone_the_service_s_hints_are_scored() -> None:
    listener = Listener(None)
    listener.hear(read_packet(begin(1)))
    listener.hear(read_packet(observe(1, 0, [1, 3])))
    listener.hear(read_packet(observe(1, 1, [1, 3])))
    listener.hear(read_packet(Overheard(1, b"").encode()))
    report = listener.report()
    assert list(report.tallies) == ["a@1"]
    assert (report.tallies["a@1"].steps, report.comparisons) == (1, ())


@pytest.mark.parametrize("packet", [b"", b"short", Overheard(1, b"\xff\xff").encode()])
def test_what_is_no_packet_is_refused(packet: bytes) -> None:
    with pytest.raises((InvalidInput, ValueError)):
        read_packet(packet)


def test_sessions_whose_end_was_not_heard_are_not_kept_for_ever() -> None:
    listener = Listener(None)
    for session in range(2 * MOST_SESSIONS):
        listener.hear(read_packet(begin(1, session)))
    assert len(listener._sessions) == MOST_SESSIONS
