"""The in-process side of the comparison makes the hints that the plug-in makes, and the ratio is of neighbours."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from compute_node.device.cpu import DONE
from compute_node.device.seam import HostCopy
from compute_node.hint_inbox import HintInbox
from compute_node.layer_sample import LayerSample
from compute_node.miss_watch import MissWatch
from predictor_service.choice import choose_predictor
from predictor_service.predictor import PredictorSource
from promoe.hint import Hint, LayerRouting, Observation, ObservedKind, StepSpan, StepStart
from tests.bench.bench_split import IN_PROCESS, SERVED, summarize
from tests.bench.greedy_chat import ChatRun
from tests.bench.hint_sources import called_in_process
from tests.bench.side_by_side import ChatFigures, PhaseFigures
from tests.promoe.specs import small_spec

SPEC = small_spec(3, 6)
NO_HIDDEN = torch.zeros(1, SPEC.hidden_size)


def routing(drawn: random.Random, layer: int) -> LayerRouting:
    return LayerRouting(layer, np.array([drawn.sample(range(SPEC.num_experts), 2)], np.uint16))


def read(hint: Hint) -> tuple[int, int, list[int], list[float]]:
    return hint.step, hint.layer, hint.experts.tolist(), hint.scores.tolist()


@pytest.mark.parametrize("name", ["frequency", "transition"])
def test_hints_are_those_of_the_plug_in(name: str) -> None:
    predictor = choose_predictor(name, PredictorSource(SPEC, Path("/no/pack")))
    drawn, session, inbox = random.Random(5), predictor.open_session(), HintInbox()
    expected: list[Hint] = []
    with called_in_process(predictor)(SPEC, inbox, MissWatch(0.0)) as caller:
        for step in range(1, 6):
            start = StepStart(step, (StepSpan("r", 1, step == 1),), ("r",) if step == 4 else ())
            wanted = caller.begin_step(start)
            assert wanted is not None
            assert (wanted.routing, wanted.layer_input, wanted.router_input) == (True, False, False)
            session.begin_step(start)
            for layer in range(SPEC.num_moe_layers):
                if layer == 0 and start.ended_request_ids:
                    session.end_requests(start.ended_request_ids)
                routings = (routing(drawn, layer),)
                sample = LayerSample(step, layer, ObservedKind.NONE, (0,), 1, HostCopy(NO_HIDDEN, DONE), routings)
                caller.take(sample)
                expected += session.observe(Observation(step, layer, (0,), 1, NO_HIDDEN.numpy(), routings))
    assert expected
    assert [read(received.hint) for received in inbox.drain()] == [read(hint) for hint in expected]


def chats(*tpots_s: float) -> list[ChatFigures]:
    phase = PhaseFigures(9, 1, 0.0, 0.0, {})
    return [ChatFigures(ChatRun((1, 2), 0.1, (tpot_s,)), phase, phase) for tpot_s in tpots_s]


def test_the_ratio_is_the_median_of_neighbours() -> None:
    figures = {SERVED: chats(1.0, 2.2, 9.0), IN_PROCESS: chats(1.0, 2.0, 3.0)}
    measured = summarize(figures, {SERVED: 0.7, IN_PROCESS: None})
    assert measured["ratio"] == pytest.approx(1.1)
    assert measured["met"] is False
    sides = measured["sides"]
    assert isinstance(sides, dict)
    assert (sides[SERVED]["decode_hit_rate"], sides[SERVED]["good_pred"]) == (0.9, 0.7)
