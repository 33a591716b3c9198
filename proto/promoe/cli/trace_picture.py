"""What happened in a trace, drawn on tracks: steps, experts, stalls, copies, hints and requests."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from promoe.cli.timeline_tracks import Arrow, Count, Instant, Slice, Timeline, Track
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent

STEPS: Final = Track("compute", "steps")
EXPERTS: Final = Track("compute", "experts")
STALLS: Final = Track("compute", "stalls")
COPIES: Final = {reason: Track("link", reason.value) for reason in LoadReason}
HINTS: Final = Track("hints", "observation to hint")
UNUSED_HINTS: Final = Track("hints", "not taken")
REQUESTS: Final = Track("requests", "requests")

_SHORTEST_HINT_S: Final = 1e-6
"""A hint whose latency is not known is drawn so long."""


@dataclass
class _OpenStep:
    """A step until its last layer is known."""

    event: StepEvent
    end_s: float
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0


@dataclass
class _OpenRequest:
    """A request until the trace ends."""

    begin_s: float
    end_s: float
    tokens: int = 0


class TracePainter:
    """Takes a trace's events in order.

    A layer's stall is drawn in one piece that ends when its last load was noticed: a trace has its length, and waits
    come after what could be computed.
    """

    def __init__(self, num_layers: int) -> None:
        tracks = (STEPS, EXPERTS, STALLS, *COPIES.values(), HINTS, UNUSED_HINTS, REQUESTS)
        self.timeline = Timeline(tracks)
        self._num_layers = num_layers
        self._step: _OpenStep | None = None
        self._step_slices: dict[int, Slice] = {}
        self._last_load_s: dict[int, float] = {}
        self._hints: dict[tuple[int, int], list[tuple[HintEvent, Slice]]] = {}
        self._requests: dict[str, _OpenRequest] = {}

    def add_all(self, events: Iterable[TraceEvent]) -> None:
        """The next events."""
        for event in events:
            if isinstance(event, LayerEvent):
                self._add_layer(event)
            elif isinstance(event, LoadEvent):
                self._add_load(event)
            elif isinstance(event, HintEvent):
                self._add_hint(event)
            else:
                self._begin_step(event)

    def finish(self) -> Timeline:
        """The whole picture."""
        self._end_step()
        for request_id, request in self._requests.items():
            args = {"tokens": request.tokens}
            self.timeline.slices.append(Slice(REQUESTS, request_id, request.begin_s, request.end_s, args))
        self._requests.clear()
        return self.timeline

    # ------------------------------------------------------------------ compute

    def _begin_step(self, event: StepEvent) -> None:
        self._end_step()
        self._step = _OpenStep(event, event.at_s)
        self._hints = {place: hints for place, hints in self._hints.items() if place[0] >= event.step}
        kinds = {"prefill" if span.is_prefill else "decode" for span in event.spans}
        tokens = sum(span.num_tokens for span in event.spans)
        name = f"step {event.step}: {' and '.join(sorted(kinds)) or 'nothing'} of {tokens}"
        args = {"requests": [span.request_id for span in event.spans], "tokens": tokens}
        # Its end is not known yet.
        drawn = Slice(STEPS, name, event.at_s, event.at_s, args)
        # A hint is for the step of its observation or for the next one.
        last_two = [(step, earlier) for step, earlier in self._step_slices.items() if step == event.step - 1]
        self._step_slices = dict([*last_two, (event.step, drawn)])
        self.timeline.slices.append(drawn)
        for span in event.spans:
            request = self._requests.setdefault(span.request_id, _OpenRequest(event.at_s, event.at_s))
            request.tokens += span.num_tokens

    def _end_step(self) -> None:
        step = self._step
        if step is None:
            return
        self._step_slices[step.event.step].end_s = step.end_s
        for span in step.event.spans:
            self._requests[span.request_id].end_s = step.end_s
        if accesses := step.hits + step.misses:
            self.timeline.counts.append(Count("compute", "hit rate", step.event.at_s, step.hits / accesses))
            self.timeline.counts.append(Count("compute", "stall in ms", step.event.at_s, step.stall_s * 1e3))

    def _add_layer(self, event: LayerEvent) -> None:
        args = {
            "tokens": event.topk_ids_TK.shape[0],
            "hits": _names(event.layer, event.hits),
            "misses": _names(event.layer, event.misses),
            "late": _names(event.layer, event.late),
            "stall_ms": round(event.stall_s * 1e3, 3),
        }
        drawn = Slice(EXPERTS, f"L{event.layer}", event.at_s, event.end_s, args)
        self.timeline.slices.append(drawn)
        self._draw_stall(event)
        for hint_event, hint_slice in self._hints.pop((event.step, event.layer), []):
            self._draw_arrow(hint_event, hint_slice, drawn)
        if self._step is not None:
            self._step.end_s = max(self._step.end_s, event.end_s)
            self._step.hits += len(event.hits)
            self._step.misses += len(event.misses)
            self._step.stall_s += event.stall_s

    def _draw_stall(self, event: LayerEvent) -> None:
        if event.stall_s <= 0:
            return
        last_load_s = min(max(self._last_load_s.get(event.layer, event.end_s), event.at_s + event.stall_s), event.end_s)
        cause = "late prefetch" if set(event.misses) <= set(event.late) else "demand load"
        begin_s = max(event.at_s, last_load_s - event.stall_s)
        self.timeline.slices.append(Slice(STALLS, f"L{event.layer}: {cause}", begin_s, last_load_s))

    # ------------------------------------------------------------------ link and hints

    def _add_load(self, event: LoadEvent) -> None:
        self._last_load_s[event.expert.layer] = event.at_s
        name = f"{event.expert} (left off)" if event.is_paused else str(event.expert)
        args = {"nbytes": event.nbytes, "noticed_ms_later": round((event.at_s - event.end_s) * 1e3, 3)}
        self.timeline.slices.append(Slice(COPIES[event.reason], name, event.begin_s, event.end_s, args))

    def _add_hint(self, event: HintEvent) -> None:
        hint = event.hint
        name = f"L{hint.layer} from L{hint.observed_layer}"
        args: dict[str, object] = {
            "step": hint.step,
            "version": hint.version,
            "experts": {
                str(ExpertId(hint.layer, expert)): round(score, 4)
                for expert, score in zip(hint.experts.tolist(), hint.scores.tolist(), strict=True)
            },
            "num_expected": hint.num_expected,
        }
        if event.fate is not HintFate.TAKEN:
            self.timeline.instants.append(Instant(UNUSED_HINTS, f"{name}: {event.fate.value}", event.at_s, args))
            return
        begin_s = event.at_s - max(event.latency_s or 0.0, _SHORTEST_HINT_S)
        drawn = Slice(HINTS, name, begin_s, event.at_s, args)
        self.timeline.slices.append(drawn)
        self._hints.setdefault((hint.step, hint.layer), []).append((event, drawn))

    def _draw_arrow(self, event: HintEvent, hint_slice: Slice, layer_slice: Slice) -> None:
        """From the step in which it was observed, through the hint, to the layer that used it."""
        points = [(hint_slice, hint_slice.begin_s), (layer_slice, layer_slice.begin_s)]
        step_slice = self._step_slices.get(event.hint.observed_step)
        if event.latency_s is not None and step_slice is not None and step_slice.begin_s <= hint_slice.begin_s:
            points.insert(0, (step_slice, hint_slice.begin_s))
        self.timeline.arrows.append(Arrow("hint", tuple(points)))


def _names(layer: int, experts: Iterable[int]) -> list[str]:
    return [str(ExpertId(layer, expert)) for expert in experts]
