"""From events to turns: what compute did between waits, and what cannot be replayed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compute_node.replay.belady import Visit
from compute_node.replay.recorded_run import RecordedRun, needed_experts
from compute_node.step_ledger import Phase
from promoe.errors import InvalidInput
from promoe.hint import StepSpan
from promoe.trace_events import LayerEvent, StepEvent, TraceEvent
from promoe.trace_file import TraceReader, TraceWriter
from tests.compute_node.replay.virtual_runs import by_step, made_up
from tests.promoe.traces import MadeUpRun


def layer(number: int, at_s: float, end_s: float, stall_s: float, experts: tuple[int, ...] = (0, 1)) -> LayerEvent:
    return LayerEvent(at_s, end_s, 1, number, np.array([experts], np.uint16), experts, (), (), stall_s)


def step(number: int, at_s: float, request: str = "r", is_prefill: bool = False) -> StepEvent:
    return StepEvent(at_s, number, (StepSpan(request, 1, is_prefill),))


def run_of(events: list[TraceEvent]) -> RecordedRun:
    return RecordedRun.of(MadeUpRun(num_layers=2).header(), by_step(events))


def test_compute_is_what_is_left_of_the_time_without_stalls() -> None:
    run = run_of(
        [
            step(1, 10.0, is_prefill=True),
            layer(0, 10.5, 12.0, 1.0),
            layer(1, 12.25, 12.75, 0.0),
            step(2, 13.0),
            layer(0, 13.5, 14.0, 0.0),
            layer(1, 14.5, 15.0, 0.0),
        ]
    )
    first, second = run.steps
    assert [(turn.lead_s, turn.experts_s) for turn in first.layers] == [(0.5, 0.5), (0.25, 0.5)]
    assert (first.phase, first.tail_s, first.compute_s, first.recorded_s) == (Phase.PREFILL, 0.25, 2.0, 3.0)
    assert (second.phase, second.tail_s) == (Phase.DECODE, 0.25), "the last one's is the usual one"
    assert run.num_accesses == 8


def test_the_time_that_nobody_asked_anything_is_nobodys_compute() -> None:
    events: list[TraceEvent] = []
    for number, (at_s, request) in enumerate([(0.0, "a"), (3.0, "a"), (100.0, "b"), (103.0, "b")], start=1):
        events += [step(number, at_s, request), layer(0, at_s + 1, at_s + 1, 0.0), layer(1, at_s + 2, at_s + 2, 0.0)]
    assert [one.tail_s for one in run_of(events).steps] == [1.0, 1.0, 1.0, 1.0]


def test_a_step_that_broke_off_is_left_out() -> None:
    run = run_of([step(1, 0.0), layer(0, 1.0, 1.0, 0.0), step(2, 2.0), layer(0, 3, 3, 0), layer(1, 4, 4, 0)])
    assert [one.start.step for one in run.steps] == [2]


@pytest.mark.parametrize(
    ("topk_ids", "needed"),
    [([[5, 2]], (5, 2)), ([[5, 2], [2, 7]], (2, 5, 7)), ([[4, 4]], (4,))],
)
def test_experts_are_asked_for_as_by_the_experts_function(topk_ids: list[list[int]], needed: tuple[int, ...]) -> None:
    assert needed_experts(np.array(topk_ids, np.uint16)) == needed


def test_visits_number_experts_over_all_layers() -> None:
    run = run_of([step(1, 0.0, is_prefill=True), layer(0, 1, 1, 0, (3, 1)), layer(1, 2, 2, 0, (0, 7))])
    assert run.visits() == [Visit(frozenset({1, 3}), False), Visit(frozenset({8, 15}), False)]
    assert run.visits(1) == [Visit(frozenset({8, 15}), False)]


def test_a_trace_with_gaps_is_refused(tmp_path: Path) -> None:
    shape = MadeUpRun()
    with TraceWriter(tmp_path / "gaps", shape.header()) as writer:
        writer.dropped_steps = 3
    with pytest.raises(InvalidInput, match="lacks 3 steps"):
        RecordedRun.read(TraceReader(tmp_path / "gaps"))


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "empty", MadeUpRun().header()):
        pass
    with pytest.raises(InvalidInput, match="no whole step"):
        RecordedRun.read(TraceReader(tmp_path / "empty"))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    shape = MadeUpRun(seed=3)
    with TraceWriter(tmp_path / "run", shape.header()) as writer:
        for event in shape.events(hidden=True):
            writer.append(event)
    read, made = RecordedRun.read(TraceReader(tmp_path / "run")), made_up(shape)
    assert read.visits() == made.visits()
    assert [one.recorded_s for one in read.steps] == [one.recorded_s for one in made.steps]
    assert replace(read.geometry, slots_per_layer=1) == replace(made.geometry, slots_per_layer=1)
