"""What holds for every untrained plug-in, whatever a node tells: its hints are hints for this model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor_service.plugins import installed_predictors
from predictor_service.predictor import Predictor, PredictorSession, PredictorSource
from predictor_service.predictors.frequency import FrequencyPredictor
from predictor_service.predictors.gate_ahead import VERSION as GATE_AHEAD
from predictor_service.predictors.gate_ahead import GateAheadSession
from predictor_service.predictors.lookahead import at_lookahead
from predictor_service.predictors.none import NonePredictor
from predictor_service.predictors.transition import TransitionPredictor
from predictor_service.routers import Routers, Scoring
from promoe.hint import Float32Array, Hint, LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from promoe.model_spec import ModelSpec
from tests.predictor_service.layer_events import make_spec, source_of

NAMES = ("frequency", "transition", "gate_ahead", "none")


def make_routers(spec: ModelSpec, rng: np.random.Generator) -> Routers:
    """Random routers."""
    shape = (spec.num_moe_layers, spec.num_experts)
    weight_LED = rng.standard_normal((*shape, spec.hidden_size)).astype(np.float32)
    zeros_LE = np.zeros(shape, np.float32)
    return Routers(Scoring.LOGIT, weight_LED, zeros_LE, zeros_LE, 1, 1)


def open_session(name: str, source: PredictorSource, routers: Routers) -> PredictorSession:
    if name == "gate_ahead":
        return GateAheadSession(source.spec, routers, at_lookahead(GATE_AHEAD, source))
    kinds: dict[str, type[FrequencyPredictor | TransitionPredictor | NonePredictor]] = {
        "frequency": FrequencyPredictor,
        "transition": TransitionPredictor,
        "none": NonePredictor,
    }
    predictor: Predictor = kinds[name](source)
    return predictor.open_session()


class RandomNode:
    """Tells any order of events that a node may tell: batches, prefills, samples, gaps and ended requests."""

    def __init__(self, spec: ModelSpec, data: st.DataObject) -> None:
        self._spec = spec
        self._draw = data.draw
        self._rng = np.random.default_rng(data.draw(st.integers(0, 99)))

    def start(self, step: int) -> StepStart:
        names = self._draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        spans = []
        for name in names:
            is_prefill = self._draw(st.booleans())
            num_tokens = self._draw(st.integers(1, 9)) if is_prefill else 1
            spans.append(StepSpan(name, num_tokens, is_prefill))
        return StepStart(step, tuple(spans))

    def observations(self, start: StepStart) -> list[Observation]:
        most = min(start.num_tokens, 4)
        rows = tuple(sorted(self._rng.choice(start.num_tokens, self._draw(st.integers(0, most)), replace=False)))
        layers = self._draw(st.lists(st.integers(0, self._spec.num_moe_layers), max_size=6, unique=True))
        return [self._observation(start, layer, rows) for layer in sorted(layers)]

    def _observation(self, start: StepStart, layer: int, rows: tuple[int, ...]) -> Observation:
        spec = self._spec
        hidden_RD: Float32Array = 100 * self._rng.standard_normal((len(rows), spec.hidden_size)).astype(np.float32)
        known = self._draw(st.lists(st.integers(0, min(layer, spec.num_moe_layers - 1)), max_size=2, unique=True))
        routings = []
        for routed in known:
            picks = [self._rng.choice(spec.num_experts, spec.experts_per_token, replace=False) for _ in rows]
            ids_RK = np.array(picks, np.uint16).reshape(len(rows), spec.experts_per_token)
            routings.append(LayerRouting(routed, ids_RK))
        return Observation(start.step, layer, rows, start.num_tokens, hidden_RD, tuple(routings))


def check_hint(hint: Hint, observation: Observation, spec: ModelSpec, start: StepStart) -> None:
    assert hint.step in (start.step, start.step + 1)
    assert 0 <= hint.layer < spec.num_moe_layers
    if hint.step == start.step:
        assert hint.layer > observation.layer
    assert (hint.observed_step, hint.observed_layer) == (observation.step, observation.layer)
    experts = hint.experts.tolist()
    assert len(experts) == len(set(experts)) == len(hint.scores)
    assert all(expert < spec.num_experts for expert in experts)
    assert np.isfinite(hint.scores).all()
    assert ((hint.scores >= 0) & (hint.scores <= 1)).all()
    assert (np.diff(hint.scores) <= 0).all(), "best first"
    assert min(spec.experts_per_token, spec.num_experts) <= hint.num_expected <= len(experts)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(st.data())
def test_hints_are_valid_whatever_is_told(name: str, data: st.DataObject) -> None:
    draw = data.draw
    experts = draw(st.sampled_from((2, 5, 8)))
    spec = make_spec(
        layers=draw(st.integers(1, 6)), experts=experts, per_token=draw(st.integers(1, min(3, experts))), hidden=4
    )
    source = source_of(spec, lookahead=draw(st.sampled_from((None, 1, 3))))
    session = open_session(name, source, make_routers(spec, np.random.default_rng(0)))
    node = RandomNode(spec, data)
    for step in range(1, draw(st.integers(2, 6))):
        start = node.start(step)
        session.begin_step(start)
        for observation in node.observations(start):
            for hint in session.observe(observation):
                check_hint(hint, observation, spec, start)
        if draw(st.booleans()):
            session.end_requests(draw(st.sampled_from(((), ("a",), ("a", "zz")))))


def test_none_hints_nothing_and_wants_to_see_nothing() -> None:
    predictor = NonePredictor(source_of(make_spec()))
    assert predictor.version.observed is ObservedKind.NONE
    assert not predictor.version.wants_routing
    start = StepStart(1, (StepSpan("a", 1, is_prefill=False),))
    predictor.open_session().begin_step(start)
    assert list(predictor.observe(Observation(1, 0, (0,), 1))) == []


def test_all_of_them_are_installed() -> None:
    assert {*NAMES, "oracle"} <= installed_predictors().keys()
