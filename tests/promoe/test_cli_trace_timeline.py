"""The picture of a trace: valid for the viewers, complete, and nothing overlaps on a thread."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cli.timeline_tracks import Arrow, Count, Instant, JsonEvent, Slice, Timeline, Track
from promoe.cli.trace_picture import TracePainter
from promoe.hint import Hint, StepSpan
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent
from promoe.trace_file import TraceWriter
from tests.promoe.command_line import CommandLine
from tests.promoe.traces import MadeUpRun

RUN = MadeUpRun(num_requests=3, decode_steps=5)
ONE = Track("group", "one")
TWO = Track("other group", "two")

Place: TypeAlias = tuple[object, object]
_KEYS = {
    "M": {"ph", "name", "pid", "args"},
    "X": {"ph", "name", "pid", "tid", "ts", "dur", "args"},
    "i": {"ph", "name", "pid", "tid", "ts", "s", "args"},
    "C": {"ph", "name", "pid", "ts", "args"},
    "s": {"ph", "name", "cat", "id", "pid", "tid", "ts"},
    "t": {"ph", "name", "cat", "id", "pid", "tid", "ts"},
    "f": {"ph", "name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def number(event: JsonEvent, key: str) -> float:
    value = event[key]
    assert isinstance(value, int | float)
    return value


def slices_by_thread(events: Iterable[JsonEvent]) -> dict[Place, list[JsonEvent]]:
    threads: defaultdict[Place, list[JsonEvent]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    return threads


def check(events: list[JsonEvent]) -> None:
    """What a viewer needs: known phases with their keys, named threads, no overlaps, arrows from slice to slice."""
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} <= {e["pid"] for e in events if e["name"] == "process_name"}
    for event in events:
        phase = str(event["ph"])
        assert set(event) - {"tid"} == _KEYS[phase] - {"tid"}, event
        if phase != "M":
            assert number(event, "ts") >= 0
        if "tid" in _KEYS[phase]:
            assert (event["pid"], event["tid"]) in named
    threads = slices_by_thread(events)
    for slices in threads.values():
        end_us = 0.0
        for each in sorted(slices, key=lambda each: number(each, "ts")):
            assert number(each, "ts") >= end_us - 1e-9, f"{each} overlaps"
            assert number(each, "dur") >= 0
            end_us = round(number(each, "ts") + number(each, "dur"), 3)
    _check_arrows(events, threads)


def _check_arrows(events: list[JsonEvent], threads: dict[Place, list[JsonEvent]]) -> None:
    phases: defaultdict[object, list[object]] = defaultdict(list)
    for event in events:
        if event["ph"] in ("s", "t", "f"):
            phases[event["id"]].append(event["ph"])
            around = [
                each
                for each in threads[event["pid"], event["tid"]]
                if number(each, "ts") <= number(event, "ts") <= number(each, "ts") + number(each, "dur")
            ]
            assert around, f"{event} starts or ends at no slice"
    assert all(each in (["s", "f"], ["s", "t", "f"]) for each in phases.values())


def painted(events: Iterable[TraceEvent], num_layers: int = RUN.num_layers) -> list[JsonEvent]:
    painter = TracePainter(num_layers)
    painter.add_all(events)
    drawn = list(painter.finish().json_events())
    check(drawn)
    return drawn


def named(events: list[JsonEvent], phase: str) -> list[str]:
    return [str(event["name"]) for event in events if event["ph"] == phase]


_TIMES = st.tuples(st.floats(0, 10), st.floats(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(st.tuples(st.sampled_from([ONE, TWO]), _TIMES), max_size=25))
def test_overlapping_slices_are_put_on_lanes(wanted: list[tuple[Track, tuple[float, float]]]) -> None:
    slices = [Slice(track, str(index), *times) for index, (track, times) in enumerate(wanted)]
    events = list(Timeline((ONE, TWO), slices).json_events())
    check(events)
    drawn = {event["name"]: event for event in events if event["ph"] == "X"}
    began_s = min((each.begin_s for each in slices), default=0.0)
    assert len(drawn) == len(slices)
    for each in slices:
        assert number(drawn[each.name], "ts") == pytest.approx((each.begin_s - began_s) * 1e6, abs=0.01)
        assert number(drawn[each.name], "dur") == pytest.approx((each.end_s - each.begin_s) * 1e6, abs=0.01)


def test_slices_that_follow_each_other_share_a_lane() -> None:
    slices = [Slice(ONE, "a", 1.0, 1.1), Slice(ONE, "b", 1.1, 1.3), Slice(ONE, "c", 1.2, 1.4)]
    timeline = Timeline((ONE, TWO), slices, [Instant(TWO, "now", 0.5)], [], [Count("group", "value", 1.0, 0.25)])
    events = list(timeline.json_events())
    check(events)
    assert {len(each) for each in slices_by_thread(events).values()} == {1, 2}
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}  # type: ignore[index]
    assert names == {"one", "one (2)", "two"}
    (instant,) = [event for event in events if event["ph"] == "i"]
    assert instant["ts"] == 0
    (count,) = [event for event in events if event["ph"] == "C"]
    assert (count["ts"], count["args"]) == (500_000, {"value": 0.25})


def test_arrows_go_from_slice_to_slice() -> None:
    first, second, third = (Slice(ONE, name, at_s, at_s + 1) for name, at_s in (("a", 0), ("b", 2), ("c", 4)))
    arrows = [Arrow("why", ((first, 0.5), (second, 2.0), (third, 4.5))), Arrow("why", ((first, 1.0), (third, 4.0)))]
    events = list(Timeline((ONE,), [third, second, first], [], arrows).json_events())
    check(events)
    assert [event["ph"] for event in events if "cat" in event] == ["s", "t", "f", "s", "f"]


def test_everything_in_a_run_is_drawn() -> None:
    events = list(RUN.events())
    drawn = painted(events)
    layers = [event for event in events if isinstance(event, LayerEvent)]
    loads = [event for event in events if isinstance(event, LoadEvent)]
    slices = named(drawn, "X")
    assert sum(name.startswith("step ") for name in slices) == 18
    assert "step 1: prefill of 5" in slices
    assert "step 2: decode of 1" in slices
    assert sum(name in {"L0", "L1", "L2"} for name in slices) == len(layers)
    assert sum(name.endswith(": demand load") for name in slices) == sum(layer.stall_s > 0 for layer in layers)
    assert all(slices.count(str(load.expert)) >= 1 for load in loads)
    assert {"r0", "r1", "r2"} <= set(slices)
    assert named(drawn, "s") == ["hint"] * len(layers)
    assert named(drawn, "C").count("hit rate") == 18


def test_a_stall_has_its_length_and_its_cause() -> None:
    ids_TK = np.zeros((1, 2), np.uint16)
    late = LayerEvent(1.0, 2.0, 1, 0, ids_TK, (1,), (3,), (3,), 0.25)
    load = LoadEvent(1.5, 0.9, 1.4, ExpertId(0, 3), LoadReason.DEMAND, 7)
    drawn = painted([StepEvent(0.9, 1, ()), load, late, replace(late, at_s=2.5, end_s=3, layer=1, late=())], 2)
    stalls = {e["name"]: (e["ts"], e["dur"]) for e in drawn if "stall" not in str(e["name"]) and ": " in str(e["name"])}
    # The first ends when its load was noticed; of the second nobody knows, so it ends with its layer.
    assert stalls["L0: late prefetch"] == (pytest.approx(350_000), pytest.approx(250_000))
    assert stalls["L1: demand load"] == (pytest.approx(1_850_000), pytest.approx(250_000))


def test_a_hint_leads_from_its_observation_to_its_layer() -> None:
    hint = Hint(2, 0, 1, 1, np.array([3, 1], np.uint16), np.array([0.9, 0.5], np.float32), 2, "v@1")
    ids_TK = np.zeros((1, 2), np.uint16)
    spans = (StepSpan("a", 1, False),)
    drawn = painted(
        [
            StepEvent(1.0, 1, spans),
            LayerEvent(1.1, 1.2, 1, 1, ids_TK, (0,), (), (), 0),
            HintEvent(1.2, hint, HintFate.TAKEN, 0.05),
            HintEvent(1.2, hint, HintFate.LATE),
            HintEvent(1.2, replace(hint, step=1), HintFate.TAKEN),  # for a layer that never came
            StepEvent(1.3, 2, spans),
            LayerEvent(1.4, 1.5, 2, 0, ids_TK, (3,), (1,), (), 0),
        ],
        2,
    )
    (drawn_hint, unused) = [event for event in drawn if event["name"] == "L0 from L1" and event["ph"] == "X"]
    assert (drawn_hint["ts"], drawn_hint["dur"]) == (pytest.approx(150_000), pytest.approx(50_000))
    assert unused["dur"] == pytest.approx(1)
    assert drawn_hint["args"]["experts"] == {"L0E3": 0.9, "L0E1": 0.5}  # type: ignore[index]
    assert named(drawn, "i") == ["L0 from L1: late"]
    assert [(e["ph"], e["ts"]) for e in drawn if e["name"] == "hint"] == [
        ("s", pytest.approx(150_000)), ("t", pytest.approx(150_000)), ("f", pytest.approx(400_000)),
    ]  # fmt: skip


def test_copies_at_the_same_time_lie_on_lanes_by_reason() -> None:
    def load(begin_s: float, end_s: float, reason: LoadReason, *, is_paused: bool = False) -> LoadEvent:
        return LoadEvent(end_s, begin_s, end_s, ExpertId(0, 1), reason, 9, is_paused=is_paused)

    prefetch, stream = LoadReason.PREFETCH, LoadReason.STREAM
    drawn = painted(
        [load(0, 2, prefetch), load(1, 3, prefetch), load(-1, 0.5, stream), load(2, 4, prefetch, is_paused=True)]
    )
    names = [e["args"]["name"] for e in drawn if e["name"] == "thread_name"]  # type: ignore[index]
    assert names == ["prefetch", "prefetch (2)", "stream"]
    assert "L0E1 (left off)" in named(drawn, "X")


def test_the_command_writes_a_file_that_viewers_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line = CommandLine(tmp_path, monkeypatch, capsys)
    with TraceWriter(tmp_path / "run.trace", RUN.header()) as writer:
        for event in RUN.events(hidden=True):
            writer.append(event)
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    ran = command_line.run("trace", "timeline", str(tmp_path / "run.trace"), "-o", str(whole))
    assert ran.code == 0, ran.err
    assert "18 steps, " in ran.err
    document = json.loads(whole.read_text())
    assert document["displayTimeUnit"] == "ms"
    check(document["traceEvents"])
    command_line.run("trace", "timeline", str(tmp_path / "run.trace"), "-o", str(part), "--skip", "2", "--steps", "3")
    steps = [name for name in named(json.loads(part.read_text())["traceEvents"], "X") if name.startswith("step ")]
    assert [name.split(":")[0] for name in steps] == ["step 3", "step 4", "step 5"]
    missing = command_line.run("trace", "timeline", str(tmp_path / "none"))
    assert (missing.code, "There is no trace at" in missing.err) == (1, True)
