"""What happened in a trace, drawn on tracks: compute with its stalls, copies, hints and requests.

Perfetto colours a slice by its name without the digits: what differs in kind differs in words.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from promoe.cli.timeline_tracks import Arrow, Count, Instant, Slice, Timeline, Track
from promoe.hint import Hint
from promoe.ids import ExpertId
from promoe.trace_events import HintEvent, HintFate, LayerEvent, LoadEvent, LoadReason, StepEvent, TraceEvent

COMPUTE: Final = Track("compute")
LINK: Final = Track("link")
UNUSED_HINTS: Final = Track("hints not taken")
REQUESTS: Final = Track("requests")

_SHORTEST_HINT_S: Final = 1e-6
"""A hint whose latency is not known is drawn so long."""


@dataclass
class _OpenStep:
    """A step until the next one begins; its slice ends with what is known of it so far."""

    event: StepEvent
    drawn: Slice
    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0


@dataclass
class _OpenRequest:
    """A request until the trace ends."""

    begin_s: float
    end_s: float
    tokens: int = 0


@dataclass
class _OpenHint:
    """A hint until its layer comes, and the copies that it led to."""

    hint: Hint
    drawn: Slice
    copies: list[Slice] = field(default_factory=list)


class TracePainter:
    """Takes a trace's events in order.

    A layer's stall is drawn in one piece that ends when its last load was noticed: a trace has its length, and waits
    come after what could be computed. What lies between a step's layers is drawn as its other compute, of which a trace
    says nothing.
    """

    def __init__(self, num_layers: int) -> None:
        self.timeline = Timeline(())
        self._num_layers = num_layers
        self._step: _OpenStep | None = None
        self._noticed_s: dict[ExpertId, float] = {}
        self._copies: list[Slice] = []
        self._hints: dict[tuple[int, int], list[_OpenHint]] = {}
        self._hint_tracks: dict[int, Track] = {}
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
        _line_up(self._copies)
        for request_id, request in self._requests.items():
            args = {"tokens": request.tokens}
            self._draw(Slice(REQUESTS, request_id, request.begin_s, request.end_s, args))
        self._requests.clear()
        hint_tracks = [track for _, track in sorted(self._hint_tracks.items())]
        self.timeline.tracks = (COMPUTE, LINK, *hint_tracks, UNUSED_HINTS, REQUESTS)
        return self.timeline

    def _draw(self, drawn: Slice) -> Slice:
        self.timeline.slices.append(drawn)
        return drawn

    # ------------------------------------------------------------------ compute

    def _begin_step(self, event: StepEvent) -> None:
        if self._step is not None and _goes_on(self._step.event, event):
            self._draw_other("head + sampling", self._step.drawn, event.at_s)
        self._end_step()
        self._hints = {place: hints for place, hints in self._hints.items() if place[0] >= event.step}
        kinds = {"prefill" if span.is_prefill else "decode" for span in event.spans}
        tokens = sum(span.num_tokens for span in event.spans)
        name = f"step {event.step}: {' and '.join(sorted(kinds)) or 'nothing'} of {_counted(tokens, 'token')}"
        args = {"requests": [span.request_id for span in event.spans], "tokens": tokens}
        self._step = _OpenStep(event, self._draw(Slice(COMPUTE, name, event.at_s, event.at_s, args)))
        for span in event.spans:
            request = self._requests.setdefault(span.request_id, _OpenRequest(event.at_s, event.at_s))
            request.tokens += span.num_tokens

    def _end_step(self) -> None:
        step = self._step
        if step is None:
            return
        for span in step.event.spans:
            self._requests[span.request_id].end_s = step.drawn.end_s
        if accesses := step.hits + step.misses:
            at_s = step.event.at_s
            self.timeline.counts.append(Count("hit rate", "%", at_s, 100 * step.hits / accesses))
            self.timeline.counts.append(Count("stall", "ms", at_s, 1e3 * step.stall_s))

    def _add_layer(self, event: LayerEvent) -> None:
        args = {
            "tokens": event.topk_ids_TK.shape[0],
            "hits": _names(event.layer, event.hits),
            "misses": _names(event.layer, event.misses),
            "late": _names(event.layer, event.late),
            "stall_ms": _ms(event.stall_s),
        }
        step = self._step
        if step is not None:
            self._draw_other("attention + router", step.drawn, event.at_s)
            step.drawn.end_s = max(step.drawn.end_s, event.end_s)
            step.hits += len(event.hits)
            step.misses += len(event.misses)
            step.stall_s += event.stall_s
        parent = step.drawn if step is not None else None
        drawn = self._draw(Slice(COMPUTE, f"L{event.layer} experts", event.at_s, event.end_s, args, parent))
        self._draw_stall(event, drawn)
        self._noticed_s.clear()
        for hint in self._hints.pop((event.step, event.layer), []):
            self._draw_arrows(hint, drawn)

    def _draw_other(self, name: str, step: Slice, end_s: float) -> None:
        """What the step did since the last that is known of it."""
        if end_s > step.end_s:
            self._draw(Slice(COMPUTE, name, step.end_s, end_s, parent=step))
            step.end_s = end_s

    def _draw_stall(self, event: LayerEvent, layer: Slice) -> None:
        if event.stall_s <= 0:
            return
        missed = [ExpertId(event.layer, expert) for expert in event.misses]
        noticed_s = [self._noticed_s[expert] for expert in missed if expert in self._noticed_s]
        last_s = min(max(max(noticed_s, default=event.end_s), event.at_s + event.stall_s), event.end_s)
        cause = "late prefetch" if set(event.misses) <= set(event.late) else "demand load"
        args = {"waited_for": [str(expert) for expert in missed]}
        self._draw(Slice(COMPUTE, f"stall ({cause})", max(event.at_s, last_s - event.stall_s), last_s, args, layer))

    # ------------------------------------------------------------------ link and hints

    def _add_load(self, event: LoadEvent) -> None:
        self._noticed_s[event.expert] = event.at_s
        name = f"{event.reason.value} {event.expert}{' (left off)' * event.is_paused}"
        args = {"nbytes": event.nbytes, "noticed_ms_later": _ms(event.at_s - event.end_s)}
        copy = self._draw(Slice(LINK, name, event.begin_s, event.end_s, args))
        self._copies.append(copy)
        if event.reason is LoadReason.PREFETCH:
            # A trace does not say which hint it was: the last one that listed the expert before the copy began.
            hints = [hint for place, hints in self._hints.items() if place[1] == event.expert.layer for hint in hints]
            before = [
                each for each in hints if each.drawn.end_s <= event.begin_s and event.expert.expert in each.hint.experts
            ]
            if before:
                max(before, key=lambda each: each.drawn.end_s).copies.append(copy)

    def _add_hint(self, event: HintEvent) -> None:
        hint = event.hint
        steps = hint.step - hint.observed_step
        name = f"L{hint.layer}{' of the next step' * (steps > 0)} from L{hint.observed_layer}"
        args = _hint_args(hint)
        if event.fate is not HintFate.TAKEN:
            self.timeline.instants.append(Instant(UNUSED_HINTS, f"{name}: {event.fate.value}", event.at_s, args))
            return
        lookahead = hint.layer - hint.observed_layer + steps * self._num_layers
        track = self._hint_tracks.setdefault(lookahead, Track(f"hints {_counted(lookahead, 'layer')} ahead"))
        begin_s = event.at_s - max(event.latency_s or 0.0, _SHORTEST_HINT_S)
        drawn = self._draw(Slice(track, name, begin_s, event.at_s, args))
        self._hints.setdefault((hint.step, hint.layer), []).append(_OpenHint(hint, drawn))

    def _draw_arrows(self, hint: _OpenHint, layer: Slice) -> None:
        """From the hint to its layer, through each copy that it led to and that came in time."""
        for copy in hint.copies:
            is_in_time = copy.end_s <= layer.begin_s
            self.timeline.arrows.append(Arrow("hint", (hint.drawn, copy, layer) if is_in_time else (hint.drawn, copy)))
        if not hint.copies:
            self.timeline.arrows.append(Arrow("hint", (hint.drawn, layer)))


def _line_up(copies: Iterable[Slice]) -> None:
    """One after the other, as on the link: a copy was handed over while others were under way, or gave way to them."""
    free_s = float("-inf")
    for copy in sorted(copies, key=lambda copy: copy.end_s):
        begin_s = max(copy.begin_s, free_s)
        copy.args = {**copy.args, "queued_ms": _ms(begin_s - copy.begin_s)}
        copy.begin_s, free_s = begin_s, copy.end_s


def _goes_on(step: StepEvent, following: StepEvent) -> bool:
    """Whether a request has tokens in both, so that the engine was not idle between them."""
    request_ids = {span.request_id for span in step.spans}
    return following.step == step.step + 1 and any(span.request_id in request_ids for span in following.spans)


def _hint_args(hint: Hint) -> Mapping[str, object]:
    scores = zip(hint.experts.tolist(), hint.scores.tolist(), strict=True)
    return {
        "step": hint.step,
        "version": hint.version,
        "experts": {str(ExpertId(hint.layer, expert)): round(score, 4) for expert, score in scores},
        "num_expected": hint.num_expected,
    }


def _names(layer: int, experts: Iterable[int]) -> list[str]:
    return [str(ExpertId(layer, expert)) for expert in experts]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
