"""The untrained plug-ins learn what there is to learn, and their scores are probabilities."""

from collections.abc import Iterator

import numpy as np
import pytest

from predictor_service.predictor import PredictorSession
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.predictors.gate_ahead import VERSION as GATE_AHEAD
from predictor_service.predictors.gate_ahead import GateAheadSession
from predictor_service.predictors.transition import TransitionPredictor
from predictor_service.routers import Routers, Scoring
from promoe.hint import Float32Array, Hint, IdArray, StepSpan, StepStart
from tests.predictor_service.layer_events import (
    calibration_error,
    decode_start,
    make_spec,
    prefill_start,
    recall,
    serve_step,
    source_of,
)

LAYERS, EXPERTS, CHOSEN, HIDDEN = 6, 16, 4, 12
SPEC = make_spec(LAYERS, EXPERTS, CHOSEN, HIDDEN)


class World:
    """Routing of one request's tokens, by layer: (L, 1, K)."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def skewed(self) -> IdArray:
        """Expert e is chosen about in proportion to 1 / (e + 1), independently in each layer."""
        share_E = 1 / np.arange(1, EXPERTS + 1)
        rows = [self.rng.choice(EXPERTS, CHOSEN, replace=False, p=share_E / share_E.sum()) for _ in range(LAYERS)]
        return np.array(rows, np.uint16)[:, None]

    def chained(self) -> IdArray:
        """Each layer's experts are the first layer's, moved on by the layer's number: a token's path is one draw."""
        first_K = self.rng.choice(EXPERTS, CHOSEN, replace=False)
        return np.array([(first_K + 3 * layer) % EXPERTS for layer in range(LAYERS)], np.uint16)[:, None]


def judged(
    session: PredictorSession, steps: Iterator[tuple[StepStart, IdArray, Float32Array | None]]
) -> list[tuple[Hint, IdArray]]:
    """Hints of the running step with what was needed."""
    pairs: list[tuple[Hint, IdArray]] = []
    for start, routing_LRK, hidden_LRD in steps:
        hints = list(serve_step(session, start, routing_LRK, hidden_LRD))
        pairs += [(hint, routing_LRK[hint.layer]) for hint in hints if hint.step == start.step]
    return pairs


def recall_of(pairs: list[tuple[Hint, IdArray]]) -> float:
    return float(np.mean([recall(hint, needed_RK.reshape(-1).tolist()) for hint, needed_RK in pairs]))


def error_of(pairs: list[tuple[Hint, IdArray]]) -> float:
    scores = [score for hint, _ in pairs for score in hint.scores.tolist()]
    needed = [expert in needed_RK for hint, needed_RK in pairs for expert in hint.experts.tolist()]
    return calibration_error(scores, needed)


def test_frequency_knows_the_popular_experts_with_calibrated_scores() -> None:
    world = World()
    session = FrequencyPredictor(source_of(SPEC)).open_session()
    pairs = judged(session, ((decode_start(step), world.skewed(), None) for step in range(1, 400)))
    late = pairs[len(pairs) // 2 :]
    assert recall_of(late) > 0.5 > CHOSEN / EXPERTS
    assert error_of(late) < 0.05


def test_frequency_forgets_what_was_popular() -> None:
    session = FrequencyPredictor(source_of(SPEC, lookahead=1)).open_session()
    old = np.tile(np.arange(CHOSEN, dtype=np.uint16), (LAYERS, 1, 1))
    new = old + np.uint16(CHOSEN)
    judged(session, ((decode_start(step), old, None) for step in range(1, 100)))
    pairs = judged(session, ((decode_start(step), new, None) for step in range(100, 200)))
    assert recall_of(pairs[:LAYERS]) < 0.5
    assert recall_of(pairs[-LAYERS:]) == 1.0


def test_frequency_of_a_batch_is_the_union_of_its_tokens() -> None:
    session = FrequencyPredictor(source_of(SPEC)).open_session()
    requests = tuple(f"r{number}" for number in range(6))
    routing_LRK = np.tile(World().skewed(), (1, 6, 1))
    pairs = judged(session, ((decode_start(step, *requests), routing_LRK, None) for step in range(1, 3)))
    one, six = pairs[0][0], pairs[-1][0]
    assert one.num_expected > CHOSEN
    assert (six.scores >= 0).all()
    assert six.num_expected >= CHOSEN


def test_transition_learns_the_paths_of_tokens() -> None:
    world = World()
    session = TransitionPredictor(source_of(SPEC)).open_session()
    pairs = judged(session, ((decode_start(step), world.chained(), None) for step in range(1, 600)))
    assert {hint.layer for hint, _ in pairs} == set(range(2, LAYERS))
    early, late = pairs[: 10 * LAYERS], pairs[-10 * LAYERS :]
    assert recall_of(early) < 0.6
    assert recall_of(late) > 0.95
    assert error_of(pairs[-len(pairs) // 4 :]) < 0.1


def test_transition_learns_from_a_prefill_and_is_silent_in_it() -> None:
    world = World()
    session = TransitionPredictor(source_of(SPEC)).open_session()
    for step in range(1, 80):
        rows = np.concatenate([world.chained() for _ in range(8)], axis=1)
        assert list(serve_step(session, prefill_start(step, 8), rows)) == []
    pairs = judged(session, ((decode_start(step), world.chained(), None) for step in range(80, 100)))
    assert recall_of(pairs) > 0.9


def test_transition_reaches_from_a_token_to_the_same_request_s_next() -> None:
    rng = np.random.default_rng(3)
    path = [np.tile(rng.choice(EXPERTS, CHOSEN, replace=False), (LAYERS, 1, 1)).astype(np.uint16) for _ in range(3)]
    session = TransitionPredictor(source_of(SPEC)).open_session()
    recalls: list[float] = []
    for step in range(1, 300):
        for hint in serve_step(session, decode_start(step), path[step % 3]):
            if hint.step == step + 1:
                assert hint.layer in (0, 1)
                recalls.append(recall(hint, path[(step + 1) % 3][hint.layer].reshape(-1).tolist()))
    assert np.mean(recalls[-20:]) > 0.95


def residual_stream(rng: np.random.Generator, drift: float) -> Float32Array:
    """(L, 1, D): each layer adds a little to what came before."""
    change_LRD = drift * rng.standard_normal((LAYERS, 1, HIDDEN))
    stream_LRD: Float32Array = (rng.standard_normal((1, 1, HIDDEN)) + np.cumsum(change_LRD, axis=0)).astype(np.float32)
    return stream_LRD


@pytest.fixture
def routers() -> Routers:
    weight_LED = np.random.default_rng(5).standard_normal((LAYERS, EXPERTS, HIDDEN)).astype(np.float32)
    zeros_LE = np.zeros((LAYERS, EXPERTS), np.float32)
    return Routers(Scoring.LOGIT, weight_LED, zeros_LE, zeros_LE, 1, 1)


def route(routers: Routers, hidden_LRD: Float32Array, offset_LE: Float32Array | float = 0.0) -> IdArray:
    """What routers with these offsets choose."""
    scores = np.stack([routers.scores(layer, hidden_RD) for layer, hidden_RD in enumerate(hidden_LRD)])
    offsets = np.broadcast_to(np.asarray(offset_LE, np.float32), (LAYERS, EXPERTS))
    return np.argsort(-(scores + offsets[:, None]), axis=2)[:, :, :CHOSEN].astype(np.uint16)


def gate_ahead_pairs(
    routers: Routers, drift: float, num_steps: int, offset_LE: Float32Array | float = 0.0
) -> list[tuple[Hint, IdArray]]:
    rng = np.random.default_rng(7)
    session = GateAheadSession(SPEC, routers, GATE_AHEAD)

    def steps() -> Iterator[tuple[StepStart, IdArray, Float32Array]]:
        for step in range(1, num_steps):
            hidden_LRD = residual_stream(rng, drift)
            yield decode_start(step), route(routers, hidden_LRD, offset_LE), hidden_LRD

    return judged(session, steps())


def test_gate_ahead_is_right_where_the_stream_does_not_change(routers: Routers) -> None:
    pairs = gate_ahead_pairs(routers, drift=0.0, num_steps=30)
    assert {hint.layer for hint, _ in pairs} == set(range(2, LAYERS))
    assert recall_of(pairs) > 0.98, "but for what the offsets learn of chance"


def test_gate_ahead_is_calibrated_where_it_does(routers: Routers) -> None:
    pairs = gate_ahead_pairs(routers, drift=0.4, num_steps=500)
    late = pairs[len(pairs) // 2 :]
    assert CHOSEN / EXPERTS < recall_of(late) < 0.95
    assert error_of(late) < 0.03


def test_gate_ahead_learns_what_the_routers_misjudge(routers: Routers) -> None:
    offset_LE = 4 * np.random.default_rng(9).standard_normal((LAYERS, EXPERTS)).astype(np.float32)
    pairs = gate_ahead_pairs(routers, drift=0.2, num_steps=500, offset_LE=offset_LE)
    tenth = len(pairs) // 10
    assert recall_of(pairs[-tenth:]) > recall_of(pairs[:tenth]) + 0.1


def test_gate_ahead_gives_a_batch_the_union(routers: Routers) -> None:
    session = GateAheadSession(SPEC, routers, GATE_AHEAD)
    rng = np.random.default_rng(1)
    hidden_LRD = np.concatenate([residual_stream(rng, 0.0) for _ in range(3)], axis=1)
    routing_LRK = route(routers, hidden_LRD)
    hints = list(serve_step(session, decode_start(1, "a", "b", "c"), routing_LRK, hidden_LRD))
    for hint in hints:
        needed = {*routing_LRK[hint.layer].reshape(-1).tolist()}
        assert needed <= {*hint.experts[: len(needed) + 2].tolist()}
        assert CHOSEN <= hint.num_expected <= 3 * CHOSEN


def test_gate_ahead_is_silent_in_a_prefill_and_learns_from_it(routers: Routers) -> None:
    session = GateAheadSession(SPEC, routers, GATE_AHEAD)
    offset_LE = 4 * np.random.default_rng(9).standard_normal((LAYERS, EXPERTS)).astype(np.float32)
    rng = np.random.default_rng(1)

    def one_step(start: StepStart, num_rows: int) -> list[tuple[Hint, IdArray]]:
        hidden_LRD = np.concatenate([residual_stream(rng, 0.1) for _ in range(num_rows)], axis=1)
        return judged(session, iter([(start, route(routers, hidden_LRD, offset_LE), hidden_LRD)]))

    before = recall_of([pair for step in range(1, 9) for pair in one_step(decode_start(step), 1)])
    for step in range(9, 60):
        start = StepStart(step, (StepSpan("p", 30, is_prefill=True),))
        assert one_step(start, 8) == []
    after = recall_of([pair for step in range(60, 68) for pair in one_step(decode_start(step), 1)])
    assert after > before + 0.1
