"""`promoe trace stats`: what is counted, shown, and printed for machines."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from promoe.cli.trace_traffic import HintGroup, TrafficCollector
from promoe.hint import Hint, StepSpan
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent
from promoe.trace_file import TraceWriter
from tests.promoe.command_line import CommandLine
from tests.promoe.traces import MadeUpRun

RUN = MadeUpRun(num_requests=3, decode_steps=20)


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path / "run.trace", RUN.header()) as writer:
        for event in RUN.events(hidden=True):
            writer.append(event)
        writer.dropped_steps = 2
    return tmp_path / "run.trace"


def hint(step: int, layer: int, experts: list[int], expected: int, observed: tuple[int, int] = (1, 0)) -> Hint:
    observed_step, observed_layer = observed
    ids = np.array(experts, np.uint16)
    scores = np.ones(len(experts), np.float32)
    return Hint(step, layer, observed_step, observed_layer, ids, scores, expected, "v@1")


def test_the_document_has_every_number(command_line: CommandLine, trace: Path) -> None:
    ran = command_line.run("trace", "stats", str(trace), "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert (document["events"], document["dropped_steps"]) == (len(list(RUN.events())), 2)
    assert (document["is_complete"], document["hidden"], document["requests"]) == (True, "layer input", 3)
    assert (document["prefill"]["tokens"], document["prefill"]["steps"]) == (15, 3)
    assert (document["decode"]["tokens"], document["decode"]["steps"]) == (60, 60)
    layers = [event for event in RUN.events() if isinstance(event, LayerEvent) and len(event.topk_ids_TK) == 1]
    assert document["decode"]["misses"] == sum(len(event.misses) for event in layers)
    assert len(document["decode"]["layers"]) == len(document["decode"]["lru_hit_rates"]) == RUN.num_layers
    # It was computed with four slots of eight, and LRU.
    assert document["cache_rates"][3] == 0.5
    decode, prefill = (document[name]["lru_hit_rates"] for name in ("decode", "prefill"))
    assert all(0 < rates[3] < 1 for rates in (*decode, *prefill))
    assert document["loads"]["demand"]["nbytes"] == 4000 * document["loads"]["demand"]["loads"]
    assert document["fates"] == {"taken": 63 * RUN.num_layers}
    assert {hints["accuracy"] for hints in document["hints"]} == {1.0}


def test_people_get_tables(command_line: CommandLine, trace: Path) -> None:
    ran = command_line.run("trace", "stats", str(trace))
    assert ran.code == 0, ran.err
    for words in (
        "made up: 3 MoE layers × 8 experts, 2 per token",
        "2 steps were left out while recording",
        "hidden states: layer input",
        "decode: routing by layer",
        "prefill: share of a token's experts that is foreseen",
        "LRU 0.5",
        "transition 4",
        "made-up@1",
        "hints (189 taken)",
    ):
        assert words in ran.out, words


def test_a_trace_that_was_cut_says_so(command_line: CommandLine, trace: Path) -> None:
    trace.write_bytes(trace.read_bytes()[:-600])
    ran = command_line.run("trace", "stats", str(trace))
    assert ran.code == 0
    assert "it was cut off" in ran.out


def test_a_trace_of_routing_alone_has_no_tables_of_loads_and_hints(command_line: CommandLine, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", RUN.header()) as writer:
        for event in RUN.events():
            if isinstance(event, StepEvent | LayerEvent):
                writer.append(event)
    ran = command_line.run("trace", "stats", str(tmp_path / "t"))
    assert "hidden states: none" in ran.out
    assert "loads" not in ran.out
    assert "hints" not in ran.out


def test_an_empty_trace_is_no_trouble(command_line: CommandLine, tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", RUN.header()):
        pass
    ran = command_line.run("trace", "stats", str(tmp_path / "t"))
    assert ran.code == 0, ran.err
    assert "0 tokens in 0 steps, hit rate –" in ran.out


def test_what_is_no_trace_is_a_sentence(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Hello\n" * 99)
    ran = command_line.run("trace", "stats", str(tmp_path / "text"))
    assert (ran.code, ran.out) == (1, "")
    assert "is no trace" in ran.err
    assert "There is no trace at" in command_line.run("trace", "stats", str(tmp_path / "none")).err


def test_loads_are_counted_by_reason() -> None:
    whole = LoadEvent(5, 1, 3, ExpertId(0, 1), LoadReason.PREFETCH, 100)
    part = replace(whole, nbytes=30, is_paused=True)
    collector = TrafficCollector(2)
    collector.add_all([whole, part, whole, replace(whole, reason=LoadReason.STREAM)])
    prefetch = collector.loads[LoadReason.PREFETCH]
    assert (prefetch.loads, prefetch.nbytes, prefetch.paused_nbytes, prefetch.link_s) == (2, 200, 30, 4)
    assert collector.loads[LoadReason.STREAM].loads == 1


def test_hints_are_judged_by_the_layer_they_were_for() -> None:
    def layer(step: int, layer: int, *experts: int) -> LayerEvent:
        return LayerEvent(0, 0, step, layer, np.zeros((1, 2), np.uint16), experts[:1], experts[1:], (), 0)

    taken, late = HintFate.TAKEN, HintFate.LATE
    collector = TrafficCollector(2)
    collector.add_all(
        [
            StepEvent(0, 1, (StepSpan("a", 1, False),)),
            HintEvent(0, hint(1, 1, [4, 5, 6, 7], 2), taken, 0.25),
            HintEvent(0, hint(1, 0, [4], 1), late, 0.5),
            HintEvent(0, hint(2, 0, [1, 2], 2, observed=(1, 1)), taken),
            HintEvent(0, hint(1, 9, [1], 1), taken),
            layer(1, 0, 4),
            layer(1, 1, 4, 6),
            StepEvent(0, 2, (StepSpan("b", 1, True),)),
            layer(2, 0, 7, 8),
            layer(2, 1, 7),
        ]
    )
    assert collector.fates == {taken: 3, late: 1}
    assert set(collector.hints) == {HintGroup("v@1", 1, False), HintGroup("v@1", 1, True)}
    decode = collector.hints[HintGroup("v@1", 1, False)]
    # Of the head [4, 5] one was routed; of [4, 5, 6] both routed ones are there.
    assert (decode.accuracy, decode.recall, decode.latency_s(50)) == (0.5, 1.0, 0.25)
    prefill = collector.hints[HintGroup("v@1", 1, True)]
    assert (prefill.accuracy, prefill.recall, prefill.latency_s(99)) == (0.0, 0.0, None)
