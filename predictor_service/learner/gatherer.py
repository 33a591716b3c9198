"""Makes documents of what sessions tell, whatever is missing: a step that lacks a routing is left out, and what comes
after a gap does not follow what came before.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from predictor_service.learner.document import BitsArray, Document, SeenToken, bfloat16_bits
from promoe.hint import IdArray, Observation, ObservedKind, PredictorVersion, StepSpan, StepStart
from promoe.model_spec import ModelSpec

MOST_OPEN_DOCUMENTS: Final = 256
"""Of all sessions; beyond it the oldest is closed: its end may never be told."""

MOST_SESSIONS: Final = 256
"""Whose end was not heard are ended, the longest silent first."""

MIN_DECODED_TOKENS: Final = 2
"""A document of fewer teaches nothing of how tokens follow each other."""


@dataclass(eq=False)
class _OpenDocument:
    document: Document
    is_broken: bool = True
    """The next token does not follow the last one that is held."""


class _RunningStep:
    """What is known of one session's running step."""

    def __init__(self, start: StepStart, observed: ObservedKind) -> None:
        self.start = start
        self.observed = observed
        self.rows: tuple[int, ...] | None = None
        self.is_whole = True
        self.hidden: dict[int, BitsArray] = {}
        self.routings: dict[int, IdArray] = {}

    def add(self, observation: Observation) -> None:
        if observation.step != self.start.step:  # the beginning of its own step was lost
            return
        if self.rows is None:
            self.rows = observation.rows
        if observation.rows != self.rows:
            self.is_whole = False
            return
        if observation.hidden_RD is not None:
            self.hidden[observation.layer] = bfloat16_bits(observation.hidden_RD)
        for routing in observation.routings:
            self.routings[routing.layer] = routing.topk_ids_RK


class Gatherer:
    """Follows sessions.

    Args:
        spec: of the model that is served.
        max_document_tokens: of one document that are held.
        finished: is given every document that is over.
    """

    def __init__(self, spec: ModelSpec, max_document_tokens: int, finished: Callable[[Document], None]) -> None:
        self._spec = spec
        self._max_tokens = max_document_tokens
        self._finished = finished
        self._observed: dict[str, ObservedKind] = {}
        self._steps: dict[int, _RunningStep] = {}
        # The session that was heard last comes last.
        self._last_step: dict[int, int] = {}
        self._open: OrderedDict[tuple[int, str], _OpenDocument] = OrderedDict()
        self.num_tokens = 0
        self.num_lost_steps = 0

    @property
    def open_nbytes(self) -> int:
        """Held by documents that are not over."""
        return sum(entry.document.nbytes for entry in self._open.values())

    def learn_version(self, version: str, observed: ObservedKind) -> None:
        """What observations of steps that are sampled for this version hold."""
        self._observed[version] = observed

    def welcomed(self, version: PredictorVersion) -> None:
        """A session was told what is wanted."""
        self.learn_version(version.version, version.observed)

    def begin_step(self, session: int, start: StepStart) -> None:
        """The step before is over."""
        self._end_step(session)
        if start.step != self._last_step.pop(session, 0) + 1:
            self._break(session)
        while len(self._last_step) >= MOST_SESSIONS:
            self.end_session(next(iter(self._last_step)))
        self._last_step[session] = start.step
        observed = self._observed.get(start.version, ObservedKind.NONE)
        if observed is ObservedKind.NONE:  # unknown, or nothing to learn from: what comes after does not follow
            self._break(session)
        else:
            self._steps[session] = _RunningStep(start, observed)

    def observe(self, session: int, observation: Observation) -> None:
        """One layer of the running step; of a step whose beginning was lost it is no use."""
        step = self._steps.get(session)
        if step is not None and self._fits(observation):
            step.add(observation)

    def end_requests(self, session: int, request_ids: Iterable[str]) -> None:
        """These documents are over."""
        # Their last step is, too: nothing of it comes after its requests' end.
        self._end_step(session)
        for request_id in request_ids:
            self._close((session, request_id))

    def end_session(self, session: int) -> None:
        """And so all its documents are."""
        self._end_step(session)
        self._last_step.pop(session, None)
        for key in [key for key in self._open if key[0] == session]:
            self._close(key)

    def close_oldest(self) -> bool:
        """Takes the oldest document as over, to make room; False where there is none."""
        if not self._open:
            return False
        self._close(next(iter(self._open)))
        return True

    def _fits(self, observation: Observation) -> bool:
        """Whether it can be of this model; the service refuses others, but a packet may be damaged."""
        spec, hidden_RD, num_rows = self._spec, observation.hidden_RD, len(observation.rows)
        if observation.layer > spec.num_moe_layers or any(row >= observation.num_tokens for row in observation.rows):
            return False
        fits = hidden_RD is None or hidden_RD.shape == (num_rows, spec.hidden_size)
        if not fits or (hidden_RD is not None and not np.isfinite(hidden_RD).all()):
            return False
        return all(
            routing.layer < spec.num_moe_layers
            and routing.topk_ids_RK.shape == (num_rows, spec.experts_per_token)
            and int(routing.topk_ids_RK.max(initial=0)) < spec.num_experts
            for routing in observation.routings
        )

    def _end_step(self, session: int) -> None:
        step = self._steps.pop(session, None)
        if step is None:
            return
        layers = range(self._spec.num_moe_layers)
        rows = step.rows or ()
        spans = _span_of_rows(step.start.spans, rows)
        is_whole = step.is_whole and rows and all(layer in step.routings for layer in layers) and step.hidden
        if not is_whole or len(spans) != len(rows):
            self.num_lost_steps += 1
            self._break(session)
            return
        num_sources = len(layers) + (step.observed is ObservedKind.LAYER_INPUT)
        seen_S = np.array([source in step.hidden for source in range(num_sources)])
        sources = [source for source in range(num_sources) if seen_S[source]]
        hidden_RVD = np.stack([step.hidden[source] for source in sources], axis=1)
        topk_ids_RLK = np.stack([step.routings[layer] for layer in layers], axis=1)
        self._break_unsampled(session, step)
        last_row: dict[str, int] = {}
        for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
            follows = last_row.get(span.request_id, row - 1) == row - 1
            last_row[span.request_id] = row
            token = SeenToken(hidden_RVD[index], seen_S, topk_ids_RLK[index], not span.is_prefill, follows)
            self._add(session, span.request_id, step.observed, token)

    def _add(self, session: int, request_id: str, observed: ObservedKind, token: SeenToken) -> None:
        key = (session, request_id)
        entry = self._open.get(key)
        if entry is not None and entry.document.observed is not observed:
            self._close(key)  # another version sees something else
            entry = None
        if entry is None:
            entry = self._open[key] = _OpenDocument(Document(f"{session}:{request_id}", observed))
            if len(self._open) > MOST_OPEN_DOCUMENTS:
                self.close_oldest()
        if len(entry.document.tokens) < self._max_tokens:
            follows = token.follows and not entry.is_broken
            # Copies: a row of a step's array would keep the others' alive.
            copied = SeenToken(token.hidden_VD.copy(), token.seen_S, token.topk_ids_LK.copy(), token.is_decode, follows)
            entry.document.add(copied)
            entry.is_broken = False
            self.num_tokens += 1

    def _break_unsampled(self, session: int, step: _RunningStep) -> None:
        """Requests whose first tokens of the step were not sampled do not follow on."""
        sampled = set(step.rows or ())
        first = 0
        for span in step.start.spans:
            entry = self._open.get((session, span.request_id))
            if entry is not None and first not in sampled:
                entry.is_broken = True
            first += span.num_tokens

    def _break(self, session: int) -> None:
        for (of_session, _), entry in self._open.items():
            if of_session == session:
                entry.is_broken = True

    def _close(self, key: tuple[int, str]) -> None:
        entry = self._open.pop(key, None)
        if entry is not None and entry.document.num_decoded >= MIN_DECODED_TOKENS:
            self._finished(entry.document)


def _span_of_rows(spans: tuple[StepSpan, ...], rows: tuple[int, ...]) -> list[StepSpan]:
    """Of each row, as far as there are spans for them."""
    ends = np.cumsum([span.num_tokens for span in spans])
    indices = np.searchsorted(ends, rows, side="right")
    return [spans[index] for index in indices if index < len(spans)]
