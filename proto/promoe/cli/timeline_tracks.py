"""Slices on tracks, as the Trace Event Format that ui.perfetto.dev and Chrome open.

Format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format"). Slices of one
thread must not overlap unless one lies in the other; so slices that do are put on lanes, each a thread of its own.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

JsonEvent: TypeAlias = dict[str, object]

_US_PER_S: Final = 1e6
_NS_DIGITS: Final = 3
"""Times are microseconds with nanoseconds behind the point."""


_MAX_LANES: Final = 1000


@dataclass(frozen=True)
class Track:
    """A row of the picture, below its group."""

    group: str
    name: str


@dataclass(eq=False)
class Slice:
    """Something that took time."""

    track: Track
    name: str
    begin_s: float
    end_s: float
    args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Instant:
    """Something that happened."""

    track: Track
    name: str
    at_s: float
    args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Arrow:
    """From slice to slice, each at a moment within it; drawn from the first to the last."""

    name: str
    points: tuple[tuple[Slice, float], ...]


@dataclass(frozen=True)
class Count:
    """The value of a counter from now on."""

    group: str
    name: str
    at_s: float
    value: float


@dataclass
class Timeline:
    """Everything that is drawn; tracks appear in the order in which they are first named in `tracks`."""

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
        threads = _Threads(self.tracks)
        places = {each: threads.place(each, clock) for each in sorted(self.slices, key=lambda each: each.begin_s)}
        instant_places = [(each, threads.first_lane(each.track)) for each in self.instants]
        yield from threads.names()
        for each, place in places.items():
            begin_us, end_us = clock.us(each.begin_s), clock.us(each.end_s)
            duration_us = round(end_us - begin_us, _NS_DIGITS)
            yield {"ph": "X", "name": each.name, "ts": begin_us, "dur": duration_us, **place, "args": dict(each.args)}
        for instant, place in instant_places:
            at_us = clock.us(instant.at_s)
            yield {"ph": "i", "s": "t", "name": instant.name, "ts": at_us, **place, "args": dict(instant.args)}
        for number, arrow in enumerate(self.arrows, 1):
            yield from _arrow_events(number, arrow, places, clock)
        for count in self.counts:
            place = {"pid": threads.pid(count.group)}
            yield {
                "ph": "C",
                "name": count.name,
                "ts": clock.us(count.at_s),
                **place,
                "args": {count.name: count.value},
            }


@dataclass(frozen=True)
class _Clock:
    began_s: float

    def us(self, at_s: float) -> float:
        return round((at_s - self.began_s) * _US_PER_S, _NS_DIGITS)


class _Threads:
    """Process and thread numbers of groups and lanes."""

    def __init__(self, tracks: Sequence[Track]) -> None:
        self._tracks = list(dict.fromkeys(tracks))
        self._pids = {group: pid for pid, group in enumerate(dict.fromkeys(track.group for track in tracks), 1)}
        self._lane_ends_us: defaultdict[Track, list[float]] = defaultdict(list)

    def pid(self, group: str) -> int:
        return self._pids[group]

    def place(self, each: Slice, clock: _Clock) -> dict[str, int]:
        """The first lane that is free; slices come in the order of their beginnings."""
        ends_us = self._lane_ends_us[each.track]
        begin_us, end_us = clock.us(each.begin_s), clock.us(each.end_s)
        lane = next((lane for lane, lane_end_us in enumerate(ends_us) if lane_end_us <= begin_us), len(ends_us))
        if lane == len(ends_us):
            ends_us.append(end_us)
        ends_us[lane] = end_us
        return self._numbers(each.track, lane)

    def first_lane(self, track: Track) -> dict[str, int]:
        if not self._lane_ends_us[track]:
            self._lane_ends_us[track].append(0.0)
        return self._numbers(track, 0)

    def names(self) -> Iterator[JsonEvent]:
        for group, pid in self._pids.items():
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": group}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for track in self._tracks:
            for lane in range(len(self._lane_ends_us[track])):
                place = self._numbers(track, lane)
                name = track.name if lane == 0 else f"{track.name} ({lane + 1})"
                yield {"ph": "M", "name": "thread_name", **place, "args": {"name": name}}
                yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": place["tid"]}}

    def _numbers(self, track: Track, lane: int) -> dict[str, int]:
        """Lanes of one track lie together: a thousand numbers for each track."""
        assert lane < _MAX_LANES, "nothing overlaps a thousand times"
        return {"pid": self._pids[track.group], "tid": self._tracks.index(track) * _MAX_LANES + lane + 1}


def _arrow_events(
    number: int, arrow: Arrow, places: Mapping[Slice, dict[str, int]], clock: _Clock
) -> Iterator[JsonEvent]:
    last = len(arrow.points) - 1
    for index, (each, at_s) in enumerate(arrow.points):
        phase = "s" if index == 0 else "f" if index == last else "t"
        event: JsonEvent = {"ph": phase, "id": number, "name": arrow.name, "cat": arrow.name, "ts": clock.us(at_s)}
        if phase == "f":
            event["bp"] = "e"  # bound to the slice around it, not to the next one
        yield event | places[each]
