"""The oracle knows what a trace of the same requests knows, however the steps are cut this time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service.predictor import PredictorSource
from predictor_service.predictors.oracle import OraclePredictor, OracleSession, read_routings
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import Hint, IdArray, StepSpan, StepStart
from promoe.trace_events import LayerEvent, TraceEvent
from promoe.trace_file import TraceWriter
from tests.predictor_service.layer_events import observed
from tests.promoe.specs import small_spec
from tests.promoe.traces import MadeUpRun

RUN = MadeUpRun(num_layers=4, num_experts=8, num_requests=2, prompt_tokens=5, decode_steps=6)
SPEC = small_spec(num_moe_layers=4, num_experts=8)
PROMPT, DECODED = RUN.prompt_tokens, RUN.decode_steps


def write(path: Path, events: Iterator[TraceEvent], dropped_steps: int = 0) -> Path:
    with TraceWriter(path, RUN.header()) as writer:
        writer.dropped_steps = dropped_steps
        for event in events:
            writer.append(event)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Path(tmp_path_factory.mktemp("trace")) / "run.trace", RUN.events())


@pytest.fixture(scope="module")
def requests(trace: Path) -> tuple[IdArray, ...]:
    return read_routings(trace, SPEC)


def open_session(trace: Path, lookahead: int | None = None) -> OracleSession:
    return OraclePredictor(PredictorSource(SPEC, Path("/no/pack"), trace, lookahead)).open_session()


def serve(session: OracleSession, start: StepStart) -> list[Hint]:
    """A whole step; the oracle does not look at what was routed."""
    session.begin_step(start)
    nothing_RK = np.zeros((1, 2), np.uint16)
    hints: list[Hint] = []
    for layer in range(5):
        hints += session.observe(replace(observed(start.step, layer, nothing_RK), routings=()))
    return hints


def span(name: str, num_tokens: int = 1, *, is_prefill: bool = False) -> StepSpan:
    return StepSpan(name, num_tokens, is_prefill)


def test_a_trace_becomes_the_routing_of_each_request(requests: tuple[IdArray, ...]) -> None:
    assert [topk_ids_LTK.shape for topk_ids_LTK in requests] == [(4, PROMPT + DECODED, 2)] * 2
    layers = [event for event in RUN.events() if isinstance(event, LayerEvent)]
    assert (requests[0][2, :PROMPT] == layers[2].topk_ids_TK).all()
    assert (requests[1][3, -1] == layers[-1].topk_ids_TK[0]).all()


def test_every_hint_is_exact(trace: Path, requests: tuple[IdArray, ...]) -> None:
    session = open_session(trace)
    (topk_ids_LTK, _) = requests
    prefill = serve(session, StepStart(1, (span("x", PROMPT, is_prefill=True),)))
    assert [(hint.step, hint.layer) for hint in prefill] == [(2, 0), (2, 1)], "none for the prefill itself"
    for number in range(DECODED):
        hints = serve(session, StepStart(2 + number, (span("x"),)))
        is_last = number == DECODED - 1
        targets = [(2 + number, 2), (2 + number, 3), *([] if is_last else [(3 + number, 0), (3 + number, 1)])]
        assert [(hint.step, hint.layer) for hint in hints] == targets
        for hint in hints:
            token = PROMPT + number + hint.step - (2 + number)
            assert hint.experts.tolist() == sorted(topk_ids_LTK[hint.layer, token].tolist())
            assert hint.num_expected == 2
            assert (hint.scores == 1).all()
    assert serve(session, StepStart(99, (span("x"),))) == [], "the trace has ended"


def test_steps_may_be_cut_and_batched_otherwise_than_they_were(trace: Path, requests: tuple[IdArray, ...]) -> None:
    session = open_session(trace, lookahead=1)
    serve(session, StepStart(1, (span("x", 3, is_prefill=True),)))
    serve(session, StepStart(2, (span("x", 2, is_prefill=True), span("y", PROMPT, is_prefill=True))))
    hints = serve(session, StepStart(3, (span("y"), span("x"))))
    assert {hint.layer for hint in hints if hint.step == 3} == {1, 2, 3}
    for hint in hints:
        token = PROMPT + hint.step - 3
        both = {*requests[0][hint.layer, token].tolist(), *requests[1][hint.layer, token].tolist()}
        assert set(hint.experts.tolist()) == both
        assert hint.num_expected == len(both)


def test_an_ended_request_makes_room_for_the_next_recorded_one(trace: Path, requests: tuple[IdArray, ...]) -> None:
    session = open_session(trace)
    serve(session, StepStart(1, (span("x", PROMPT, is_prefill=True),)))
    session.end_requests(("x", "never seen"))
    serve(session, StepStart(2, (span("x", PROMPT, is_prefill=True),)))
    hint = serve(session, StepStart(3, (span("x"),)))[0]
    assert hint.experts.tolist() == sorted(requests[1][2, PROMPT].tolist())
    unknown = serve(session, StepStart(4, (span("a third"),)))
    assert unknown == []


def test_every_session_begins_at_the_beginning(trace: Path) -> None:
    predictor = OraclePredictor(PredictorSource(SPEC, Path("/no/pack"), trace))
    first, second = (
        [hint.experts.tolist() for hint in serve(predictor.open_session(), StepStart(1, (span("x"),)))]
        for _ in range(2)
    )
    assert first == second
    assert predictor.version.version == "oracle@1"
    assert open_session(trace, lookahead=3) is not None


def test_a_trace_that_was_cut_ends_with_its_last_whole_step(tmp_path: Path) -> None:
    events = list(RUN.events())
    last_layer = max(index for index, event in enumerate(events) if isinstance(event, LayerEvent))
    routings = read_routings(write(tmp_path / "cut.trace", iter(events[:last_layer])), SPEC)
    assert routings[1].shape == (4, PROMPT + DECODED - 1, 2)


def test_what_it_cannot_know_from_is_refused(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"needs a recorded trace; give its path with predictor\.artifact"):
        OraclePredictor(PredictorSource(SPEC, Path("/no/pack")))
    with pytest.raises(ModelNotFound, match="no trace at"):
        read_routings(tmp_path / "none.trace", SPEC)
    with pytest.raises(ModelMismatch, match=r"fingerprint 00c0ffee; .* has fingerprint beef"):
        read_routings(trace, small_spec(4, 8, fingerprint="beef"))
    gappy = write(tmp_path / "gappy.trace", RUN.events(), dropped_steps=3)
    with pytest.raises(InvalidInput, match="lacks 3 steps"):
        read_routings(gappy, SPEC)
