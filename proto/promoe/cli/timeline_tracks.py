"""Slices on tracks, as the Trace Event Format that ui.perfetto.dev opens.

Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format"). Slices of one
thread must not overlap unless one lies in the other; so slices that do are put on lanes, each a thread of its own.
Perfetto orders threads by their numbers, within their process only; so there is one process.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, TypeAlias

JsonEvent: TypeAlias = dict[str, object]

_US_PER_S: Final = 1e6
_NS_DIGITS: Final = 3
"""Times are microseconds with nanoseconds behind the point."""

_PROCESS: Final = {"pid": 1}
_FIRST_THREAD: Final = 2
"""The thread with its process's number is marked "main thread"."""


@dataclass(frozen=True)
class Track:
    """A row of the picture."""

    name: str


@dataclass(eq=False)
class Slice:
    """Something that took time; its parent, if any, encloses it, is drawn right above it and was appended before it."""

    track: Track
    name: str
    begin_s: float
    end_s: float
    args: Mapping[str, object] = field(default_factory=dict)
    parent: "Slice | None" = None


@dataclass(frozen=True, eq=False)
class Instant:
    """Something that happened."""

    track: Track
    name: str
    at_s: float
    args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Arrow:
    """Through slices, from the end of each to the beginning of the next, which must not be earlier."""

    name: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Count:
    """The value of a counter from now on."""

    name: str
    unit: str
    at_s: float
    value: float


@dataclass
class Timeline:
    """Everything that is drawn; tracks appear in the order of `tracks`, then counters."""

    tracks: Sequence[Track]
    slices: list[Slice] = field(default_factory=list)
    instants: list[Instant] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def json_events(self) -> Iterator[JsonEvent]:
        """In the format's own order: names first, then what happened; times count from the earliest one."""
        begins = [each.begin_s for each in self.slices]
        moments = [instant.at_s for instant in self.instants] + [count.at_s for count in self.counts]
        clock = _Clock(min(begins + moments, default=0.0))
        threads = _Threads(self, clock)
        yield from threads.names()
        for each, place in threads.places():
            begin_us, end_us = clock.us(each.begin_s), clock.us(each.end_s)
            duration_us = round(end_us - begin_us, _NS_DIGITS)
            yield {"ph": "X", "name": each.name, "ts": begin_us, "dur": duration_us, **place, "args": dict(each.args)}
        for instant in self.instants:
            place, at_us = threads.first_lane(instant.track), clock.us(instant.at_s)
            yield {"ph": "i", "s": "t", "name": instant.name, "ts": at_us, **place, "args": dict(instant.args)}
        for number, arrow in enumerate(self.arrows, 1):
            yield from _arrow_events(number, arrow, threads, clock)
        for each_count in self.counts:
            args = {each_count.unit: each_count.value}
            yield {"ph": "C", "name": each_count.name, "ts": clock.us(each_count.at_s), **_PROCESS, "args": args}


@dataclass(frozen=True)
class _Clock:
    began_s: float

    def us(self, at_s: float) -> float:
        return round((at_s - self.began_s) * _US_PER_S, _NS_DIGITS)


class _Threads:
    """The lanes of tracks, and their numbers."""

    def __init__(self, timeline: Timeline, clock: _Clock) -> None:
        self._lane_ends_us: dict[Track, list[float]] = {track: [] for track in timeline.tracks}
        self._lanes: dict[Slice, int] = {}
        for each in sorted(timeline.slices, key=lambda each: each.begin_s):
            self._lanes[each] = self._lanes[each.parent] if each.parent else self._take_lane(each, clock)
        for instant in timeline.instants:
            self._lane_ends_us[instant.track] = self._lane_ends_us[instant.track] or [0.0]
        numbers = count(_FIRST_THREAD)
        self._tids = {
            (track, lane): next(numbers)
            for track, ends_us in self._lane_ends_us.items()
            for lane in range(len(ends_us))
        }

    def names(self) -> Iterator[JsonEvent]:
        yield {"ph": "M", "name": "process_name", **_PROCESS, "args": {"name": "promoe"}}
        for (track, lane), tid in self._tids.items():
            name = track.name if lane == 0 else f"{track.name} ({lane + 1})"
            yield {"ph": "M", "name": "thread_name", **_PROCESS, "tid": tid, "args": {"name": name}}

    def places(self) -> Iterator[tuple[Slice, dict[str, int]]]:
        """All slices in the order of their beginnings, parents before their children."""
        return ((each, self.place(each)) for each in self._lanes)

    def place(self, each: Slice) -> dict[str, int]:
        return {**_PROCESS, "tid": self._tids[each.track, self._lanes[each]]}

    def first_lane(self, track: Track) -> dict[str, int]:
        return {**_PROCESS, "tid": self._tids[track, 0]}

    def _take_lane(self, each: Slice, clock: _Clock) -> int:
        """The first that is free; slices come in the order of their beginnings."""
        ends_us = self._lane_ends_us[each.track]
        begin_us, end_us = clock.us(each.begin_s), clock.us(each.end_s)
        lane = next((lane for lane, lane_end_us in enumerate(ends_us) if lane_end_us <= begin_us), len(ends_us))
        ends_us[lane : lane + 1] = [end_us]
        return lane


def _arrow_events(number: int, arrow: Arrow, threads: _Threads, clock: _Clock) -> Iterator[JsonEvent]:
    last = len(arrow.slices) - 1
    for index, each in enumerate(arrow.slices):
        phase = "s" if index == 0 else "f" if index == last else "t"
        at_us = clock.us(each.begin_s)
        event: JsonEvent = {"ph": phase, "id": number, "name": arrow.name, "cat": arrow.name, "ts": at_us}
        if phase == "f":
            event["bp"] = "e"  # bound to the slice around it, not to the next one
        yield event | threads.place(each)
